# SPDX-License-Identifier: Apache-2.0
"""Two parsers of one request: haproxy's, and then ours of what haproxy passes on.

What haproxy takes for one request, with a body that ends where the bytes on that connection end,
is one request with that body here, or is refused and the connection closed. Then nobody can
hide a second request in a first one's body. Our own short cut for common heads must say what the
parser says that it saves.
"""

import contextlib
import itertools
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from gunicorn.config import Config
from lab.processes import process, program, wait_until

from imageserver.server.connection import Connection
from imageserver.server.request import HeadRules, ImageRequest, _HeadReader, parse_head
from proving.odd import Odd, odd_requests

_CONFIG = """
global
    maxconn 256
defaults
    mode http
    option http-server-close
    http-reuse never
    retries 0
    timeout client 2s
    timeout client-fin 1s
    timeout server 2s
    timeout connect 2s
    timeout http-request 1s
frontend clients
    bind unix@{front}
    option disable-h2-upgrade
    default_backend hosts
backend hosts
    server host unix@{host}
"""
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
#: haproxy sends what it has of a body at once; a body that never ends was refused by it.
_PATIENCE_SECONDS = 0.3
_CLIENTS = 16
#: Of a body whose length is said.
_MOST = 1 << 60
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_LAST_CHUNK = re.compile(rb"\r\n0+\r\n(?:.*\r\n)?\r\n$", re.DOTALL)


class Host:
    """Where haproxy passes requests on to: remembers the bytes of each connection."""

    def __init__(self, path: Path) -> None:
        self.received: list[bytes] = []
        host = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                host.received.append(_received(self.request))

        class Listener(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Listener(str(path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _received(sock: socket.socket) -> bytes:
    """Read a request as haproxy has written it, and whatever else is on its connection; answer."""
    sock.settimeout(_PATIENCE_SECONDS)
    data = b""
    with contextlib.suppress(OSError):
        while not _is_whole(data):
            piece = sock.recv(65536)
            if not piece:
                return data
            data += piece
        sock.sendall(_ANSWER)
        while piece := sock.recv(65536):
            data += piece
    return data


def _is_whole(data: bytes) -> bool:
    """Tell whether a request of haproxy's own, plain writing is complete."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not end:
        return False
    if _CHUNKED.search(head):
        return bool(_LAST_CHUNK.search(b"\r\n" + body))
    return len(body) >= _length(head)


def _length(head: bytes) -> int:
    """Return how long a body is that haproxy passes on, as it says itself."""
    found = _LENGTH.search(head)
    return int(found[1]) if found else 0


def rules() -> HeadRules:
    """Return the configuration that the server's parser has."""
    cfg = Config()
    cfg.set("http_parser", "python")
    return HeadRules(cfg)


def misread(using: HeadRules, data: bytes) -> str:
    """Say what is wrong about how the bytes of a connection are read here; "": nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        conn = Connection(ours, ("192.0.2.1", 1), None)
        conn.buffer += data
        if not conn.has_head():
            return ""  # and none comes: the connection ends
        head = conn.take_head()
        try:
            request = parse_head(using, head, conn.address, 1)
        except Exception:  # noqa: BLE001 - gunicorn's have no common root: refused, and closed
            return ""
        if request.length > _MOST:
            return ""  # chunked: refused, and closed
        if request.length != _length(head):
            return f"a body of {request.length} bytes"
        del conn.buffer[: request.length]
        # The client may have hung up in the middle of the body: then less comes. What follows a
        # CONNECT goes through haproxy as it is; here it ends the connection.
        is_another = conn.buffer and not (request.method == "CONNECT" and request.should_close())
        return f"another request: {bytes(conn.buffer)!r}" if is_another else ""


def disagreement(using: HeadRules, data: bytes) -> str:
    """Say where the short cut for common heads and the parser differ; "": nowhere."""
    head = data[: data.find(b"\r\n\r\n") + 4] if b"\r\n\r\n" in data else data
    common = using.common.read(head)
    if common is None:
        return ""
    try:
        parsed = ImageRequest(using, _HeadReader(head), ("192.0.2.1", 1), 1)
    except Exception as exc:  # noqa: BLE001 - as above
        return f"taken, but refused by the parser: {exc!r}"
    names = ("method", "uri", "path", "query", "version", "length", "expects_continue")
    told = [(name, getattr(common, name), getattr(parsed, name)) for name in names]
    told.append(("should_close", common.should_close(), parsed.should_close()))
    return ", ".join(f"{name}: {one!r}, not {other!r}" for name, one, other in told if one != other)


def _ask(front: Path, odd: Odd) -> None:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(4)
        sock.connect(str(front))
        sock.sendall(odd.data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


def passed_on(directory: Path, asked: list[Odd]) -> list[bytes]:
    """Ask haproxy all of it; return the bytes of each connection that it has made to its host."""
    front, host, config = (directory / name for name in ("front", "host", "haproxy.cfg"))
    config.write_text(_CONFIG.format(front=front, host=host))
    command = [program("haproxy"), "-f", str(config)]
    with Host(host) as recorder, process(command, front.exists):
        with ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(_ask, itertools.repeat(front), asked))
        wait_until(lambda: recorder.received)
    return recorder.received


def run(directory: Path, seed: str, count: int) -> Iterator[tuple[str, list[str]]]:
    """Yield each request and what was wrong about it, first as it is, then as haproxy passes it."""
    using, asked = rules(), odd_requests(seed, count)
    for odd in asked:
        wrong = disagreement(using, odd.data)
        yield f"short cut: {odd.data!r}", [wrong] if wrong else []
    for data in passed_on(directory, asked):
        found = misread(using, data), disagreement(using, data)
        yield f"passed on: {data!r}", [text for text in found if text]
