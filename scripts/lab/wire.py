# SPDX-License-Identifier: Apache-2.0
"""An HTTP client on a bare socket: cheap, and its user knows how far each exchange has come."""

import json
import re
import socket
import ssl
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

_BUFFER = 256 * 1024
_STATUS = re.compile(rb"HTTP/1\.1 [0-9]{3} ")
_FRAMING = re.compile(rb"(?i)\r\n(?:content-length: *([0-9]+)|transfer-encoding: *(chunked))")
_FIRST_FINAL = 200


class Hanging(Exception):
    """The server took longer than the client is patient; ``str()`` says with what."""


class Cut(Exception):
    """The connection ended before the answer did; ``body`` has what came of it."""

    def __init__(self, why: object, body: bytes = b"") -> None:
        super().__init__(f"{type(why).__name__}: {why}" if isinstance(why, OSError) else why)
        self.body = body


@dataclass(frozen=True)
class Head:
    """Status and header fields."""

    raw: bytes

    @property
    def status(self) -> int:
        """The status code."""
        return int(self.raw[9:12])

    @cached_property
    def fields(self) -> dict[str, str]:
        """The header fields, by their names in lower case."""
        lines = self.raw.decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines)
        return {name.lower(): value.strip() for name, _, value in pairs}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that has come whole."""

    status: int
    fields: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - JSON
        """The body, parsed."""
        return json.loads(self.body)


class Wire:
    """One connection. What breaks it raises ``Cut``, what takes too long ``Hanging``."""

    def __init__(
        self,
        port: int,
        seconds: float,
        context: ssl.SSLContext | None = None,
        *,
        host: str = "127.0.0.1",
        buffer: int = _BUFFER,
    ) -> None:
        """Connect, with TLS if there is a ``context``; ``seconds``: for any one step.

        Raises:
            Cut: there is nobody.
        """
        try:
            self._sock = socket.create_connection((host, port), seconds)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context:
                self._sock = context.wrap_socket(self._sock, server_hostname=host)
        except OSError as exc:
            raise Cut(exc) from exc
        self._host = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        #: What has come and was not taken lies in [start, stop) of the one buffer.
        self._bytes = bytearray(buffer)
        self._buffer = memoryview(self._bytes)
        self._start = self._stop = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._sock.close()

    def ask(
        self, method: str, path: str, fields: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        """Send a request; with its length if it has a body."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
        lines += [f"Content-Length: {len(body)}"] if body else []
        self.send("\r\n".join([*lines, "", ""]).encode())
        self.send(body)

    def send(self, data: bytes | memoryview) -> None:
        """Send bytes."""
        try:
            self._sock.sendall(data)
        except TimeoutError as exc:
            raise Hanging("nothing is taken") from exc
        except OSError as exc:
            raise Cut(exc) from exc

    def head(self) -> Head:
        """Receive the head of an answer."""
        head = Head(self._until(b"\r\n\r\n"))
        if not _STATUS.match(head.raw):
            raise Cut(f"no answer: {head.raw[:80]!r}")
        return head

    def pieces(self, head: Head, method: str = "GET") -> Iterator[memoryview]:
        """Yield the body as it comes, in pieces that are valid until the next."""
        if head.status < _FIRST_FINAL or method == "HEAD":
            return
        length, chunked = found.groups() if (found := _FRAMING.search(head.raw)) else (None, None)
        if chunked:
            while size := int(self._until(b"\r\n"), 16):
                yield from self._take(size)
                self._until(b"\r\n")
            self._until(b"\r\n")
        elif length:
            yield from self._take(int(length))
        else:
            while self._start < self._stop or self._receive(len(self._buffer), may_end=True):
                yield from self._take(self._stop - self._start)

    def body(self, head: Head, method: str = "GET", pause: float = 0.0) -> bytes:
        """Receive a body; ``pause``: that many seconds after each piece."""
        body = bytearray()
        try:
            for piece in self.pieces(head, method):
                body += piece
                if pause:
                    time.sleep(pause)
        except Cut as exc:
            exc.body = bytes(body)
            raise
        return bytes(body)

    def answer(self, method: str = "GET") -> Answer:
        """Receive a whole answer."""
        head = self.head()
        return Answer(head.status, head.fields, self.body(head, method))

    def vanish(self) -> None:
        """Close with a reset, as a client that has crashed."""
        reset_on_close(self._sock)
        self._sock.close()

    def _receive(self, most: int, *, may_end: bool = False) -> int:
        """Receive at most ``most`` bytes behind what was not taken yet."""
        if self._start == self._stop:
            self._start = self._stop = 0
        try:
            count = self._sock.recv_into(self._buffer[self._stop :], most)
        except TimeoutError as exc:
            raise Hanging("nothing comes") from exc
        except OSError as exc:
            raise Cut(exc) from exc
        if not count and not may_end:
            raise Cut("ended early")
        self._stop += count
        return count

    def _take(self, size: int) -> Iterator[memoryview]:
        while size:
            if self._start == self._stop:
                self._receive(min(size, len(self._buffer)))
            stop = min(self._stop, self._start + size)
            piece = self._buffer[self._start : stop]
            size -= len(piece)
            self._start = stop
            yield piece

    def _until(self, mark: bytes) -> bytes:
        """Receive up to a mark, and return what stands before it."""
        while (at := self._bytes.find(mark, self._start, self._stop)) < 0:
            left = self._stop - self._start
            self._buffer[:left] = bytes(self._buffer[self._start : self._stop])
            self._start, self._stop = 0, left
            self._receive(len(self._buffer) - left)
        found = bytes(self._buffer[self._start : at])
        self._start = at + len(mark)
        return found


def reset_on_close(sock: socket.socket) -> None:
    """Make ``close`` send RST: the client vanishes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
