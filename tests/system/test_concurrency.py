# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, and connections used in every way HTTP allows."""

import contextlib
import select
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.clients import read_answer
from tests.system.harness import Server, exchange, qemu_img, qemu_nbd, repeatable

SIZE = 4 << 20
NAMES = ("raw", "qcow2", "file", "other-file")


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return {name: repeatable(name).randbytes(SIZE) for name in NAMES}


@pytest.fixture(scope="module")
def server(workplace: Path, contents: dict[str, bytes]) -> Iterator[Server]:
    for name, content in contents.items():
        (workplace / name).write_bytes(content)
    qemu_img("convert", "-O", "qcow2", workplace / "qcow2", workplace / "image.qcow2")
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(qemu_nbd(workplace / "raw"))
        qcow2 = stack.enter_context(qemu_nbd(workplace / "image.qcow2", fmt="qcow2"))
        running = stack.enter_context(Server(workplace, client_timeout=1))
        running.add("raw", socket=str(raw))
        running.add("qcow2", socket=str(qcow2))
        for name in ("file", "other-file"):
            running.add(name, backend="file", file=str(workplace / name))
        yield running


def read_ranges(server: Server, contents: dict[str, bytes], seed: int, count: int) -> list[str]:
    """Read ranges of all images on one kept-alive connection; return what went wrong."""
    choose = repeatable(seed)
    wrong = []
    with contextlib.closing(server.connect()) as connection:
        connection.connect()
        sock = connection.sock
        for _ in range(count):
            name = choose.choice(NAMES)
            start = choose.randrange(SIZE)
            stop = min(SIZE, start + choose.randint(1, 16384))
            headers = {"Range": f"bytes={start}-{stop - 1}"}
            answer = exchange(connection, "GET", f"/images/{name}", headers=headers)
            if (answer.status, answer.body) != (206, contents[name][start:stop]):
                wrong.append(f"{name} {start}-{stop}: {answer.status} {len(answer.body)} bytes")
        if connection.sock is not sock:
            wrong.append("the connection was closed in between")
    return wrong


def test_eight_clients_read_500_ranges_each_and_every_byte_is_right(server, contents):
    with ThreadPoolExecutor(8) as clients:
        wrong = clients.map(lambda seed: read_ranges(server, contents, seed, 500), range(8))
    assert list(wrong) == [[]] * 8
    assert server.holders() == []


def test_fifty_connections_of_one_client_take_turns(server, contents):
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(contextlib.closing(server.connect())) for _ in range(50)]
        for turn in range(4):
            for number, connection in enumerate(connections):
                name = NAMES[(turn + number) % 4]
                headers = {"Range": f"bytes={number}-{number + 999}"}
                answer = exchange(connection, "GET", f"/images/{name}", headers=headers)
                assert (answer.status, answer.body) == (206, contents[name][number : number + 1000])


def test_writers_of_different_files_and_readers_do_not_mix_up_bytes(workplace):
    """Each client writes its own image and reads it back, over and over, beside the others."""
    bodies = [bytes([65 + number]) * (300_000 + number) for number in range(4)]
    home = workplace / "writers"
    home.mkdir()
    barrier = threading.Barrier(4)

    def write_and_read(server: Server, number: int) -> list[object]:
        url = server.add(f"w{number}", backend="file", file=str(home / f"w{number}"))
        seen: list[object] = []
        barrier.wait(10)
        with contextlib.closing(server.connect()) as connection:
            for turn in range(25):
                body = bodies[(number + turn) % 4]
                seen.append(exchange(connection, "PUT", url, body).status)
                seen.append(exchange(connection, "GET", url).body == body)
        return seen

    with Server(home, max_writers=4) as server, ThreadPoolExecutor(4) as clients:
        seen = list(clients.map(lambda number: write_and_read(server, number), range(4)))
    assert seen == [[200, True] * 25] * 4


@pytest.mark.parametrize("name", NAMES)
def test_pipelined_requests_are_answered_in_order(server, contents, name):
    spans = [(n * 1000, n * 1000 + 500 + n) for n in range(40)]
    requests = b"".join(
        b"GET /images/%s HTTP/1.1\r\nHost: x\r\nRange: bytes=%d-%d\r\n\r\n"
        % (name.encode(), start, stop - 1)
        for start, stop in spans
    )
    with server.raw(requests) as sock, sock.makefile("rb") as stream:
        bodies = [read_answer(stream).body for _ in spans]
    assert bodies == [contents[name][start:stop] for start, stop in spans]


def test_pipelined_uploads_and_probes_are_answered_in_order(server, workplace):
    url = server.add("pipe", backend="file", file=str(workplace / "pipe"))
    put = b"PUT %s HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n%%04d" % url.encode()
    probe = b"OPTIONS %s HTTP/1.1\r\nHost: x\r\n\r\n" % url.encode()
    get = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % url.encode()
    requests = b"".join((put % number) + probe + get for number in range(20))
    with server.raw(requests) as sock, sock.makefile("rb") as stream:
        answers = [read_answer(stream) for _ in range(60)]
    assert [answer.body for answer in answers[::3]] == [b'{"ok":true,"bytes_written":4}'] * 20
    assert [answer.json["features"] for answer in answers[1::3]] == [
        ["flush", "digest", "checksum"]
    ] * 20
    assert [answer.body for answer in answers[2::3]] == [b"%04d" % n for n in range(20)]


#: Version and Connection header of a request; whether the connection lives on.
CONNECTIONS = [
    pytest.param("1.1", "", True, id="HTTP/1.1"),
    pytest.param("1.1", "Connection: keep-alive\r\n", True, id="HTTP/1.1 keep-alive"),
    pytest.param("1.1", "Connection: close\r\n", False, id="HTTP/1.1 close"),
    pytest.param("1.1", "Connection: Close\r\n", False, id="HTTP/1.1 Close"),
    pytest.param("1.1", "Connection: TE, close\r\n", False, id="HTTP/1.1 close in a list"),
    pytest.param("1.2", "", True, id="HTTP/1.2"),
    pytest.param("1.0", "", False, id="HTTP/1.0"),
    pytest.param("1.0", "Connection: close\r\n", False, id="HTTP/1.0 close"),
]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        pytest.param("GET", "/images/raw", 200, id="image"),
        pytest.param("GET", "/images/file", 200, id="file"),
        pytest.param("HEAD", "/images/raw", 200, id="HEAD"),
        pytest.param("OPTIONS", "/images/raw", 200, id="OPTIONS"),
        pytest.param("GET", "/images/nobody", 404, id="unknown"),
        pytest.param("GET", "/images/raw/extents", 200, id="extents"),
        pytest.param("POST", "/images/raw/flush", 200, id="flush"),
    ],
)
@pytest.mark.parametrize(("version", "field", "lives_on"), CONNECTIONS)
def test_a_connection_ends_when_the_client_says_so(
    server, contents, version, field, lives_on, method, path, status
):
    request = f"{method} {path} HTTP/{version}\r\nHost: x\r\n{field}\r\n".encode()
    with server.raw(request) as sock, sock.makefile("rb") as stream:
        answer = read_answer(stream, method)
        assert answer.status == status
        assert answer.headers["Accept-Ranges"] == "bytes"
        if (method, status) == ("GET", 200):
            body = contents.get(path.removeprefix("/images/"))
            assert answer.body == (body or b'[{"start":0,"length":%d,"zero":false}]' % SIZE)
        if lives_on:
            sock.sendall(request)
            assert read_answer(stream, method).status == status
        else:
            assert answer.headers["Connection"] == "close"
            assert stream.read() == b""


def test_http_1_0_gets_no_chunks(server):
    with server.raw(b"GET /images/raw/extents HTTP/1.0\r\n\r\n") as sock:
        answer = read_answer(sock.makefile("rb"))
    assert "Transfer-Encoding" not in answer.headers
    assert answer.json == [{"start": 0, "length": SIZE, "zero": False}]


def test_an_idle_connection_outlives_the_client_timeout(server):
    with contextlib.closing(server.connect()) as connection:
        assert exchange(connection, "OPTIONS", "/images/raw").status == 200
        sock = connection.sock
        # What must not come is awaited: the end of the connection, after 1 s of silence.
        assert select.select([sock], [], [], 2.0) == ([], [], [])
        assert exchange(connection, "OPTIONS", "/images/raw").status == 200
        assert connection.sock is sock


def test_a_head_that_comes_byte_by_byte_is_one_head(server, contents):
    request = b"GET /images/raw HTTP/1.1\r\nHost: x\r\nRange: bytes=5-9\r\n\r\n"
    with server.raw() as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            for at in range(len(request)):
                sock.sendall(request[at : at + 1])
            assert read_answer(stream).body == contents["raw"][5:10]


def test_empty_lines_before_a_request_are_skipped(server, contents):
    request = b"\r\n\r\nGET /images/raw HTTP/1.1\r\nHost: x\r\nRange: bytes=5-9\r\n\r\n"
    with server.raw(request * 3) as sock, sock.makefile("rb") as stream:
        assert [read_answer(stream).body for _ in range(3)] == [contents["raw"][5:10]] * 3
