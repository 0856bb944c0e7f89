# SPDX-License-Identifier: Apache-2.0
"""Clients that take no answers, and back ends that hang: what needs neither is answered at once."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import read_answer
from tests.system.harness import Server

#: The contract's second.
SECOND = 1.0
#: More than there are probe threads.
CLIENTS = 12
HUNG = 40


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    """One worker, so that every client is the same threads' guest.

    Listens at a Unix socket too, whose buffers are soon full.
    """
    (workplace / "image").write_bytes(b"image")
    server = Server(workplace, workers=1, threads=4)
    server.env["IMAGESERVER_BIND"] += f",unix:{workplace / 'server.sock'}"
    with server as running:
        running.add("file", backend="file", file=str(workplace / "image"))
        yield running


@contextlib.contextmanager
def hanging(server: Server, count: int) -> Iterator[list[str]]:
    """NBD servers that accept and say nothing; yield the paths of their images."""
    with contextlib.ExitStack() as stack:
        paths = []
        for number in range(count):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            path = server.directory / f"hung{number}.sock"
            stack.callback(path.unlink)
            listener.bind(str(path))
            listener.listen(64)
            paths.append(server.add(f"hung{number}", socket=str(path)))
        yield paths


def assert_others_are_served(server: Server) -> None:
    for method, path, status in (
        ("OPTIONS", "/images/*", 200),
        ("OPTIONS", "/images/file", 200),
        ("HEAD", "/images/file", 200),
        ("OPTIONS", "/images/nobody", 404),
        ("GET", "/images/file", 200),
    ):
        began = time.monotonic()
        assert server.request(method, path).status == status
        assert time.monotonic() - began < SECOND, (method, path)


@pytest.mark.parametrize(
    "line", [b"OPTIONS * HTTP/1.1", b"OPTIONS /images/file HTTP/1.1", b"GET /images/x HTTP/1.1"]
)
def test_clients_that_ask_and_take_no_answer_keep_nobody_waiting(server, line):
    requests = (line + b"\r\nHost: x\r\n\r\n") * 200
    with contextlib.ExitStack() as stack:
        for _ in range(CLIENTS):  # one by one: no more at a time than there are threads
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(server.directory / "server.sock"))
            client.settimeout(0.15)
            while takes(client, requests):
                pass
        assert_others_are_served(server)


def takes(client: socket.socket, requests: bytes) -> bool:
    """Send requests; False where the server takes no more of them."""
    try:
        client.sendall(requests)
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_a_back_end_that_hangs_delays_none_but_those_who_ask_for_it(server, method):
    with hanging(server, 1) as (path,), contextlib.ExitStack() as stack:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        clients = [stack.enter_context(server.raw(head)) for _ in range(100)]
        assert_others_are_served(server)

        answers = [read_answer(client.makefile("rb"), method) for client in clients]
        assert {answer.status for answer in answers} == {504 if method == "HEAD" else 200}
        began = time.monotonic()
        assert server.request(method, path).status == answers[0].status
        assert time.monotonic() - began < SECOND  # known to hang


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_many_back_ends_that_hang_delay_none_but_those_who_ask_for_them(server, method):
    with hanging(server, HUNG) as paths, contextlib.ExitStack() as stack:
        heads = [f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n" for path in paths]
        began = time.monotonic()
        clients = [stack.enter_context(server.raw(head.encode())) for head in heads]
        assert_others_are_served(server)

        answers = [read_answer(client.makefile("rb"), method) for client in clients]
        assert time.monotonic() - began < 5
        expected = {503, 504} if method == "HEAD" else {200}
        assert {answer.status for answer in answers} <= expected
        for answer in answers:
            assert (answer.status == 503) == ("Retry-After" in answer.headers)


def test_the_lists_and_versions_of_http_1_1_hold_for_probes(server):
    head = b"OPTIONS * HTTP/1.2\r\nHost: x\r\nConnection: TE, close\r\n\r\n"
    with server.raw(head) as sock, sock.makefile("rb") as stream:
        assert stream.peek(8).startswith(b"HTTP/1.1 ")
        answer = read_answer(stream, "OPTIONS")
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        assert stream.read() == b""
