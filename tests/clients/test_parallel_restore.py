# SPDX-License-Identifier: Apache-2.0
"""Parallel restore (docs/api.md): writers of one image side by side, and who still has it alone."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.operations import (
    BY_BODY,
    BY_GATE,
    OPERATIONS,
    SIZE,
    ask,
    head,
    held_at_the_gate,
    held_by_the_client,
)
from tests.system.clients import read_answer
from tests.system.harness import (
    Server,
    exchange,
    nbdkit,
    qemu_nbd,
    repeatable,
    wait_until,
)

PART = SIZE // 4
CONTENT = repeatable("content").randbytes(SIZE)
BUSY = (409, "image busy")


@pytest.fixture(scope="module", params=[1, 4], ids=["one_writer", "four_writers"])
def server(request: pytest.FixtureRequest, workplace: Path) -> Iterator[Server]:
    home = workplace / f"w{request.param}"
    home.mkdir()
    with Server(home, max_writers=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def parallel(workplace: Path) -> Iterator[Server]:
    home = workplace / "parallel"
    home.mkdir()
    with Server(home, max_writers=4) as running:
        yield running


# Side by side


def rendezvous(home: Path, parties: int) -> tuple[str, ...]:
    """Return nbdkit's arguments for a disk whose writes end only when so many are in it at once."""
    meet = (
        f"touch {home}/met.$4; n=0; until [ $(ls {home} | grep -c met) -ge {parties} ]; do "
        "sleep 0.01; n=$((n + 1)); [ $n -lt 500 ] || { echo EIO alone >&2; exit 1; }; done"
    )
    store = f"dd of={home}/disk bs=64k seek=$4 oflag=seek_bytes conv=notrunc status=none"
    return (
        "eval",
        "thread_model=echo parallel",
        f"get_size=echo {SIZE}",
        "can_write=exit 0",
        "can_multi_conn=exit 0",
        "pread=head -c $3 /dev/zero",
        f"pwrite={store} && {meet}",
    )


WAYS = {
    "put": lambda start: ("PUT", {"Content-Range": f"bytes {start}-{start + PART - 1}/*"}),
    "patch": lambda start: ("PATCH", {"Range": f"bytes={start}-{start + PART - 1}"}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_four_connections_write_disjoint_parts_at_once(parallel, tmp_path, way):
    """Each write of the back end waits for the other three: in turns, none would end."""

    def write(start: int) -> tuple[int, dict[str, object]]:
        method, headers = way(start)
        with contextlib.closing(parallel.connect()) as connection:
            body = CONTENT[start : start + PART]
            answer = exchange(connection, method, path, body, headers)
        return answer.status, answer.json

    (tmp_path / "disk").write_bytes(bytes(SIZE))
    with nbdkit(parallel.directory / "meet.sock", *rendezvous(tmp_path, 4)) as sock:
        path = parallel.add("meet", socket=str(sock))
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(write, range(0, SIZE, PART)))
    assert answers == [(200, {"ok": True, "bytes_written": PART})] * 4
    assert (tmp_path / "disk").read_bytes() == CONTENT


def restore(server: Server, path: str, number: int) -> list[int]:
    """Write one quarter in pieces over one connection, with zeroes and flushes in between."""
    piece = PART // 16
    seen = []
    with contextlib.closing(server.connect()) as connection:
        for at in range(number * PART, (number + 1) * PART, piece):
            zero = b'{"op":"zero","offset":%d,"size":%d}' % (at, piece)
            json = {"Content-Type": "application/json"}
            seen.append(exchange(connection, "PATCH", path, zero, json).status)
            where = {"Content-Range": f"bytes {at}-*/*"}
            body = CONTENT[at : at + piece]
            seen.append(exchange(connection, "PUT", path + "?flush=y", body, where).status)
            seen.append(exchange(connection, "POST", path + "/flush").status)
    return seen


def test_four_writers_never_meet_each_others_lock(parallel, workplace):
    """Another id, the same image: the lock is the image's."""
    disk = workplace / "restored"
    disk.write_bytes(bytes(SIZE))
    with qemu_nbd(disk) as sock, ThreadPoolExecutor(4) as clients:
        paths = [parallel.add(f"restore-{n % 2}", socket=str(sock)) for n in range(4)]
        seen = list(clients.map(lambda n: restore(parallel, paths[n], n), range(4)))
        answer = parallel.request("GET", paths[0] + "/extents")
    assert seen == [[200] * 48] * 4
    assert answer.status == 200
    assert disk.read_bytes() == CONTENT
    assert parallel.holders() == []


def write_at_once(server: Server, path: str, number: int, barrier: threading.Barrier) -> set[int]:
    """Write one block a few times over one connection, at the same moments as all others."""
    first = number * 512
    where = {"Content-Range": f"bytes {first}-{first + 511}/*"}
    seen = set()
    with contextlib.closing(server.connect()) as connection:
        for _ in range(3):
            barrier.wait()
            seen.add(exchange(connection, "PUT", path, bytes(512), where).status)
    return seen


def test_sixty_four_writers_at_once_never_refuse_one_another(workplace, tmp_path):
    disk, many = tmp_path / "disk", 64
    disk.write_bytes(bytes(many * 512))
    barrier = threading.Barrier(many, timeout=60)
    home = workplace / "many"
    home.mkdir()
    with (
        qemu_nbd(disk, "--shared=0") as sock,
        Server(home, max_writers=many, threads=many) as server,
        ThreadPoolExecutor(many) as clients,
    ):
        path = server.add("many", socket=str(sock))
        seen = clients.map(lambda n: write_at_once(server, path, n, barrier), range(many))
        assert set.union(*seen) == {200}


@pytest.mark.parametrize(
    ("fields", "writers"),
    [({}, 1), ({"read_only": True}, 0), ({"backend": "file", "file": "/nothing"}, 1)],
    ids=["nbd_that_is_away", "read_only", "file"],
)
def test_options_says_how_many_may_write(server, fields, writers):
    path = server.add("probed", **{"socket": "/nothing"} | fields)
    assert server.request("OPTIONS", path).json["max_writers"] == writers


@pytest.mark.parametrize("flush", [None, "image"])
@pytest.mark.parametrize("clients", [1, 32], ids=["for_one_client", "for_many"])
def test_options_says_that_several_may_write_where_the_export_bears_it(
    server, workplace, clients, flush
):
    (workplace / "probed").write_bytes(bytes(SIZE))
    with qemu_nbd(workplace / "probed", f"--shared={clients}") as sock:
        path = server.add("probed", socket=str(sock), flush=flush)
        allowed = int(server.env["IMAGESERVER_MAX_WRITERS"]) if clients > 1 else 1
        assert server.request("OPTIONS", path).json["max_writers"] == allowed


# Exports without multi-conn


def one_at_a_time(home: Path) -> tuple[str, ...]:
    """Return nbdkit's arguments for a disk that fails writes while another connection writes."""
    enter = f"mkdir {home}/busy || {{ touch {home}/met; echo EIO two >&2; exit 1; }}"
    return (
        *("eval", "thread_model=echo parallel", f"get_size=echo {SIZE}"),
        *("can_write=exit 0", "can_flush=exit 0", "pread=head -c $3 /dev/zero"),
        f"pwrite={enter}; cat >/dev/null; sleep 0.02; rmdir {home}/busy",
        "flush=exit 0",
    )


def test_without_multi_conn_one_writes_at_a_time_and_somebody_always_does(parallel, home):
    """Every worker meets the export for the first time, with many clients at once."""
    for round_ in range(4):
        with nbdkit(home / f"{round_}.sock", *one_at_a_time(home)) as sock:
            path = parallel.add("single", socket=str(sock))
            where = {"Content-Range": "bytes 0-9/*"}
            with ThreadPoolExecutor(16) as clients:
                asked = [
                    clients.submit(parallel.request, "PUT", path, bytes(10), where)
                    for _ in range(16)
                ]
                seen = [each.result() for each in asked]
        refused = {BUSY, (503, "too many parallel writes")}
        assert {answer.refusal for answer in seen if answer.status != 200} <= refused
        assert [answer for answer in seen if answer.status == 200]
    assert not (home / "met").exists()
    assert parallel.holders() == []


def test_a_second_writer_of_an_export_without_multi_conn_is_refused(parallel, home):
    (home / "disk").write_bytes(bytes(SIZE))
    with qemu_nbd(home / "disk", "--shared=1") as sock:
        parallel.add("gated", socket=str(sock))
        for _ in range(2):
            with held_by_the_client(parallel, "put part"):
                others = ("zero", "patch part", "flush", "put", "extents")
                assert [ask(parallel, other) for other in others] == [BUSY] * 5
            assert ask(parallel, "flush") == (200, "")


# Alone


@pytest.fixture(scope="module")
def gated(server: Server) -> Iterator[Path]:
    """An image at /images/gated whose next read, zero, flush or extents waits behind a gate."""
    home = server.directory

    def gate(name: str, then: str) -> str:
        wait = f"while [ -e {home}/taken.{name} ]; do sleep 0.01; done"
        return (
            f"{name}=if mv {home}/gate.{name} {home}/taken.{name} 2>/dev/null; then {wait}; fi;"
            f" {then}"
        )

    abilities = ("write", "zero", "flush", "extents", "multi_conn")
    with nbdkit(
        home / "gated.sock",
        "eval",
        "thread_model=echo parallel",
        f"get_size=echo {SIZE}",
        *(f"can_{ability}=exit 0" for ability in abilities),
        "pwrite=cat >/dev/null",
        gate("pread", "head -c $3 /dev/zero"),
        gate("zero", "true"),
        gate("flush", "true"),
        gate("extents", "echo $4 $3"),
    ) as sock:
        server.add("gated", socket=str(sock))
        yield home


FREE = {"read", "options"}
SHARING = {"put part", "patch part", "zero", "flush", "patch flush"}


def expected(writers: int, holder: str, asked: str) -> tuple[int, str]:
    """Return the answer that the contract has for one operation while another runs."""
    together = writers > 1 and {holder, asked} <= SHARING
    if together or FREE & {holder, asked}:
        return (206 if asked == "read" else 200), ""
    return BUSY


@pytest.mark.parametrize("holder", [*BY_BODY, *BY_GATE])
def test_who_has_the_image_shares_it_only_as_the_table_says(server, gated, holder):
    writers = int(server.env["IMAGESERVER_MAX_WRITERS"])
    held = (
        held_at_the_gate(server, gated, holder)
        if holder in BY_GATE
        else held_by_the_client(server, holder)
    )
    with held:
        seen = {asked: ask(server, asked) for asked in OPERATIONS}
    assert seen == {asked: expected(writers, holder, asked) for asked in OPERATIONS}
    assert ask(server, "put") == (200, "")


def test_a_fifth_writer_finds_no_slot_and_nobody_waits(parallel, workplace):
    (workplace / "shared").write_bytes(bytes(SIZE))
    with qemu_nbd(workplace / "shared") as sock:
        parallel.add("gated", socket=str(sock))
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(held_by_the_client(parallel, "put part"))
            assert ask(parallel, "put part") == (503, "too many parallel writes")
            assert ask(parallel, "zero") == (503, "too many parallel writes")
            assert ask(parallel, "flush") == (200, "")
            assert [ask(parallel, alone) for alone in ("put", "extents")] == [BUSY] * 2
        assert ask(parallel, "put") == (200, "")


def writer_elsewhere(server: Server, stack: contextlib.ExitStack, other: socket.socket) -> int:
    """Begin a write in another worker than that of ``other``; return its pid."""
    for _ in range(100):
        sock = stack.enter_context(server.raw())
        pid = server.worker_of(sock)
        if pid != server.worker_of(other):
            sock.sendall(head("patch part", "Expect: 100-continue"))
            assert read_answer(sock.makefile("rb")).status == 100
            return pid
    raise AssertionError("one worker takes all connections")


def test_a_writer_that_is_killed_takes_nobody_with_it(parallel, workplace):
    (workplace / "shared").write_bytes(bytes(SIZE))
    with qemu_nbd(workplace / "shared") as sock, contextlib.ExitStack() as stack:
        parallel.add("gated", socket=str(sock))
        with held_by_the_client(parallel, "put part") as survivor:
            os.kill(writer_elsewhere(parallel, stack, survivor), signal.SIGKILL)
            wait_until(lambda: parallel.holders() == ["WRITE gated"])
            assert ask(parallel, "zero") == (200, "")
            assert ask(parallel, "extents") == BUSY
        assert ask(parallel, "extents") == (200, "")
        assert ask(parallel, "put") == (200, "")
