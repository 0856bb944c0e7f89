# SPDX-License-Identifier: Apache-2.0
"""Clients that behave as no library would: half-read answers, half-sent bodies, raw bytes."""

import contextlib
import http.client
import socket
from collections.abc import Iterator
from typing import BinaryIO

from tests.system.harness import Answer, Server, wait_until


def read_answer(stream: BinaryIO, method: str = "GET") -> Answer:
    """Read one answer from a raw connection (``sock.makefile("rb")``), and not a byte more."""
    words = stream.readline().split(b" ", 2)
    assert words[0] in {b"HTTP/1.1", b"HTTP/1.0"}, words
    status = int(words[1])
    headers = http.client.parse_headers(stream)
    body = b""
    if method == "HEAD" or status < 200:
        pass
    elif headers.get("Transfer-Encoding") == "chunked":
        while size := int(stream.readline(), 16):
            body += stream.read(size)
            assert stream.readline() == b"\r\n"
        assert stream.readline() == b"\r\n"
    elif "Content-Length" in headers:
        body = stream.read(int(headers["Content-Length"]))
        assert len(body) == int(headers["Content-Length"])
    else:
        body = stream.read()
    return Answer(status, headers, body)


@contextlib.contextmanager
def reading(server: Server, path: str) -> Iterator[socket.socket]:
    """Begin to read an image and take no more than the head: it must exceed the socket buffers."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += sock.recv(1)
        assert head.startswith(b"HTTP/1.1 200 "), head
        yield sock


@contextlib.contextmanager
def putting(
    server: Server, path: str, length: int, data: bytes = b""
) -> Iterator[tuple[socket.socket, BinaryIO]]:
    """Begin a PUT that has passed every check, holds lock and slot, and has sent ``data``."""
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n"
    request = head.encode() + b"Expect: 100-continue\r\n\r\n"
    with server.raw(request) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).status == 100
        sock.sendall(data)
        yield sock, stream


@contextlib.contextmanager
def one_connection_each(server: Server) -> Iterator[list[http.client.HTTPConnection]]:
    """Open idle connections until every worker has accepted one; yield one for each."""
    with contextlib.ExitStack() as stack:
        found: dict[int, http.client.HTTPConnection] = {}

        def each_has_one() -> bool:
            connection = stack.enter_context(contextlib.closing(server.connect()))
            connection.connect()
            found[server.worker_of(connection.sock)] = connection
            return len(found) == server.workers

        wait_until(each_has_one, 30)
        yield list(found.values())
