# SPDX-License-Identifier: Apache-2.0
"""Limits across processes: slots, image locks, and how both come back."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.clients import one_connection_each, putting, read_answer, reading
from tests.system.disks import sparse
from tests.system.harness import Answer, Server, exchange, nbdkit, qemu_nbd, wait_until
from tests.system.killing import kill_worker

SIZE = 64 << 20  # more than the socket buffers of a connection hold
SMALL = 64 << 10
TOO_MANY_READS = (503, "too many parallel reads")
TOO_MANY_WRITES = (503, "too many parallel writes")
BUSY = (409, "image busy")
ZERO = b'{"op":"zero","size":512}'
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def images(workplace: Path) -> Iterator[dict[str, dict[str, object]]]:
    """Transfers: two big images and a small one behind NBD, a second id of the first, a file."""
    for name, size in (("one", SIZE), ("two", SIZE), ("small", SMALL)):
        sparse(workplace / name, size)
    (workplace / "file").write_bytes(bytes(SMALL))
    (workplace / "file-link").symlink_to("file")
    with contextlib.ExitStack() as stack:
        socks = {
            name: str(stack.enter_context(qemu_nbd(workplace / name, export="e")))
            for name in ("one", "two", "small")
        }
        (workplace / "link.sock").symlink_to(socks["one"])
        fixed = {name: {"socket": path, "export": "e"} for name, path in socks.items()}
        yield fixed | {
            "again": {"backend": "NBD", "socket": str(workplace / "link.sock"), "export": "e"},
            "file": {"backend": "file", "file": str(workplace / "file")},
            "file-again": {"backend": "file", "file": str(workplace / "file-link")},
        }


@contextlib.contextmanager
def serving(home: Path, images: dict[str, Any], **settings: object) -> Iterator[Server]:
    home.mkdir(exist_ok=True)
    with Server(home, **settings) as server:
        for name, fields in images.items():
            server.add(name, **fields)
        yield server


@pytest.fixture(scope="module")
def server(workplace: Path, images: dict[str, Any]) -> Iterator[Server]:
    with serving(workplace / "default", images) as running:
        yield running


@pytest.fixture(scope="module")
def single(workplace: Path, images: dict[str, Any]) -> Iterator[Server]:
    """One reader and one writer; small pieces, so that an answer has several."""
    with serving(
        workplace / "single", images, max_readers=1, max_writers=1, chunk_size=16384
    ) as running:
        yield running


@contextlib.contextmanager
def eight_readers(server: Server) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for number in range(8):
            stack.enter_context(reading(server, f"/images/{('one', 'two')[number % 2]}"))
        yield


def nothing_held(server: Server) -> bool:
    return wait_until(lambda: server.holders() == [])


def test_the_ninth_read_is_503_whichever_worker_answers(server):
    with one_connection_each(server) as connections:
        assert len(connections) == 3
        with eight_readers(server):
            assert [line.split()[0] for line in server.holders()] == ["READ"] * 8
            for connection in connections:
                answer = exchange(connection, "GET", "/images/file")
                assert answer.refusal == TOO_MANY_READS
                assert int(answer.headers["Retry-After"]) >= 1
        assert nothing_held(server)
        for connection in connections:
            assert exchange(connection, "GET", "/images/file").status == 200


def test_one_slot_that_comes_back_is_one_more_read(server):
    with eight_readers(server):
        pass
    with contextlib.ExitStack() as seven:
        assert nothing_held(server)
        for _ in range(7):
            seven.enter_context(reading(server, "/images/one"))
        assert server.request("GET", "/images/file").status == 200
        with reading(server, "/images/two"):
            assert server.request("GET", "/images/file").refusal == TOO_MANY_READS
    assert nothing_held(server)


PROBES = [
    ("OPTIONS", "/images/one"),
    ("OPTIONS", "/images/file"),
    ("HEAD", "/images/one"),
    ("HEAD", "/images/file"),
]


def test_probes_answer_and_writes_go_on_while_all_reads_are_taken(server):
    with eight_readers(server), putting(server, "/images/one", SIZE):
        assert [server.request(*probe).status for probe in PROBES * 10] == [200] * 40
        assert server.request("GET", "/images/file").refusal == TOO_MANY_READS
        assert server.request("PUT", "/images/file", b"x").refusal == TOO_MANY_WRITES
        assert server.request("POST", "/images/file/flush").status == 200
    assert nothing_held(server)


#: While ``one`` is being written: (method, path, body, headers) and what it is answered.
WHILE_WRITING: dict[str, tuple[tuple[str, str, bytes | None, dict[str, str]], Any]] = {
    "PUT same image": (("PUT", "/images/one", b"", {}), BUSY),
    "PUT other id of it": (("PUT", "/images/again", b"", {}), BUSY),
    "zero same image": (("PATCH", "/images/one", ZERO, JSON), BUSY),
    "zero other id of it": (("PATCH", "/images/again", ZERO, JSON), BUSY),
    "PATCH same image": (("PATCH", "/images/one", b"x", {"Range": "bytes=0-0"}), BUSY),
    "flush same image": (("POST", "/images/one/flush", None, {}), BUSY),
    "PATCH flush same image": (("PATCH", "/images/one", b'{"op":"flush"}', JSON), BUSY),
    "extents same image": (("GET", "/images/one/extents", None, {}), BUSY),
    "extents other id of it": (("GET", "/images/again/extents", None, {}), BUSY),
    "PUT other image": (("PUT", "/images/two", b"", {}), TOO_MANY_WRITES),
    "PUT file": (("PUT", "/images/file", b"", {}), TOO_MANY_WRITES),
    "zero other image": (("PATCH", "/images/two", ZERO, JSON), TOO_MANY_WRITES),
    "PATCH other image": (
        ("PATCH", "/images/two", b"x", {"Range": "bytes=0-0"}),
        TOO_MANY_WRITES,
    ),
    "GET same image": (("GET", "/images/one", None, {"Range": "bytes=0-9"}), 206),
    "GET other id of it": (("GET", "/images/again", None, {"Range": "bytes=0-9"}), 206),
    "HEAD same image": (("HEAD", "/images/one", None, {}), 200),
    "OPTIONS same image": (("OPTIONS", "/images/one", None, {}), 200),
    "flush other image": (("POST", "/images/two/flush", None, {}), 200),
    "extents other image": (("GET", "/images/two/extents", None, {}), 200),
}


@pytest.fixture(scope="module")
def answers_while_writing(server: Server) -> Callable[[str], Answer]:
    with putting(server, "/images/one", SIZE, bytes(1 << 20)):
        assert server.holders() == ["WRITE one"]
        answers = {name: server.request(*asked) for name, (asked, _) in WHILE_WRITING.items()}
    assert nothing_held(server)
    return answers.__getitem__


@pytest.mark.parametrize("name", WHILE_WRITING)
def test_while_an_image_is_written(answers_while_writing, name):
    answer, expected = answers_while_writing(name), WHILE_WRITING[name][1]
    if isinstance(expected, int):
        assert answer.status == expected
    else:
        assert answer.refusal == expected
        assert int(answer.headers["Retry-After"]) >= 1


def test_two_ids_of_one_file_share_its_lock(server):
    with putting(server, "/images/file", SMALL):
        assert server.request("PUT", "/images/file-again", b"").refusal == BUSY
        assert server.request("POST", "/images/file-again/flush").refusal == BUSY
        assert server.request("GET", "/images/file-again").status == 200
    assert nothing_held(server)


def test_extents_in_progress_keep_writers_out_and_take_no_slot(server, workplace):
    """A server of which block status never returns holds the lock; a slow one shows it."""
    sock = workplace / "slow.sock"
    with nbdkit(sock, "--filter=delay", "memory", "1M", "delay-extents=3") as path:
        server.add("slow", socket=str(path))
        with server.raw(b"GET /images/slow/extents HTTP/1.1\r\nHost: x\r\n\r\n") as asking:
            wait_until(lambda: server.holders() == ["OTHER slow"])
            assert server.request("PUT", "/images/slow", bytes(1 << 20)).refusal == BUSY
            assert server.request("GET", "/images/slow/extents").refusal == BUSY
            assert server.request("GET", "/images/slow").status == 200
            assert server.request("PUT", "/images/small", bytes(SMALL)).status == 200
            assert read_answer(asking.makefile("rb")).status == 200
        assert server.request("PUT", "/images/slow", bytes(1 << 20)).status == 200


def test_a_worker_killed_while_it_reads_frees_the_slot_for_the_next_request(single):
    for _ in range(3):
        with reading(single, "/images/one") as sock:
            assert single.request("GET", "/images/small").refusal == TOO_MANY_READS
            kill_worker(single, sock)
        assert single.request("GET", "/images/small").status == 200
    assert wait_until(lambda: len(single.worker_pids()) == 3)


@pytest.mark.parametrize("name", ["one", "file"])
def test_a_worker_killed_while_it_writes_frees_lock_and_slot_for_the_next_request(single, name):
    size = len(single.request("GET", f"/images/{name}").body)
    for _ in range(3):
        with putting(single, f"/images/{name}", size, bytes(size // 2)) as (sock, _):
            assert single.request("PUT", f"/images/{name}", bytes(size)).refusal == BUSY
            kill_worker(single, sock)
        assert single.request("PUT", f"/images/{name}", bytes(size)).status == 200
    assert wait_until(lambda: len(single.worker_pids()) == 3)


def test_a_worker_killed_leaves_the_transfers_of_the_others_alone(server):
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(reading(server, "/images/one")) for _ in range(6)]
        workers = {server.worker_of(sock): sock for sock in readers}
        assert len(workers) > 1
        victim, survivor = list(workers)[:2]
        kill_worker(server, workers[victim])
        left = SIZE
        while left and (received := len(workers[survivor].recv(1 << 20))):
            left -= received
        assert left == 0
    assert nothing_held(server)


#: Requests each of which meets its predecessor's lock or slot, should that still be held.
SEQUENCES: dict[str, tuple[str, str, bytes | None, dict[str, str]]] = {
    "GET": ("GET", "/images/small", None, {}),
    "range": ("GET", "/images/small", None, {"Range": "bytes=100-30000"}),
    "GET file": ("GET", "/images/file", None, {}),
    "extents": ("GET", "/images/small/extents", None, {}),
    "dirty extents": ("GET", "/images/small/extents?context=dirty", None, {}),
    "PUT": ("PUT", "/images/small", bytes(SMALL), {}),
    "PUT file": ("PUT", "/images/file", bytes(SMALL), {}),
    "PATCH": ("PATCH", "/images/small", bytes(512), {"Range": "bytes=512-1023"}),
    "zero": ("PATCH", "/images/small", ZERO, JSON),
    "flush": ("POST", "/images/small/flush", None, {}),
    "refused after the lock": ("PUT", "/images/small", b"short", {}),
    "416": ("GET", "/images/small", None, {"Range": "bytes=99999-"}),
}
OK = {200, 206}


@pytest.mark.parametrize("kept_alive", [True, False], ids=["kept alive", "fresh"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_who_has_the_last_byte_never_meets_its_own_lock_or_slot(single, name, kept_alive):
    expected = {"refused after the lock": {400}, "416": {416}}.get(name, OK)
    with contextlib.closing(single.connect()) as connection:
        for _ in range(150):
            if kept_alive:
                answer = exchange(connection, *SEQUENCES[name])
            else:
                answer = single.request(*SEQUENCES[name])
            assert answer.status in expected
    assert single.holders() == []
