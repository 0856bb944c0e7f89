# SPDX-License-Identifier: Apache-2.0
"""HTTP as bytes on a socket: a client of a storm must know how far each exchange has come."""

import json
import random
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

#: Longer than every timeout of the server in the storm: what is slower than this hangs.
PATIENCE_SECONDS = 40.0
_PIECE = 256 * 1024


class Hanging(Exception):
    """The server took longer than any of its own bounds allows."""


class Cut(Exception):
    """The connection ended before the answer did; ``body`` has what came of it."""

    def __init__(self, why: str, body: bytes = b"") -> None:
        super().__init__(why)
        self.body = body


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: ``body`` whole."""

    status: int
    fields: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:  # noqa: ANN401 - JSON
        """The body, parsed."""
        return json.loads(self.body)


class Wire:
    """One connection to the server. Errors of the connection become ``Cut``."""

    def __init__(self, port: int) -> None:
        try:
            self._sock = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)
        except OSError as exc:
            raise Cut(f"connect: {exc}") from exc
        self._stream: BinaryIO = self._sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stream.close()
        self._sock.close()

    def ask(self, method: str, path: str, fields: dict[str, str] | None = None) -> None:
        """Send a head."""
        lines = [f"{method} {path} HTTP/1.1", "Host: x"]
        lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def send(self, data: bytes) -> None:
        """Send bytes."""
        try:
            self._sock.sendall(data)
        except TimeoutError as exc:
            raise Hanging("nothing is taken") from exc
        except OSError as exc:
            raise Cut(f"send: {exc}") from exc

    def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of an answer."""
        words = self._line().split(b" ", 2)
        if len(words) < 3 or words[0] != b"HTTP/1.1":  # noqa: PLR2004
            raise Cut(f"no answer: {words}")
        fields = {}
        while line := self._line().rstrip():
            name, _, value = line.partition(b":")
            fields[name.decode().lower()] = value.strip().decode()
        return int(words[1]), fields

    def body(self, fields: dict[str, str], pause: float = 0.0) -> bytes:
        """Read a body; ``pause``: that many seconds after each piece."""
        if fields.get("transfer-encoding") == "chunked":
            return self._chunks()
        body = bytearray()
        self._take(int(fields.get("content-length", "0")), body, pause)
        return bytes(body)

    def answer(self) -> Answer:
        """Read a whole answer."""
        status, fields = self.head()
        return Answer(status, fields, self.body(fields))

    def vanish(self) -> None:
        """Be gone, with a reset."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            line = self._line().strip()
            if not line:
                raise Cut("cut in a chunk", bytes(body))
            size = int(line, 16)
            self._take(size, body)
            self._line()
            if size == 0:
                return bytes(body)

    def _take(self, size: int, body: bytearray, pause: float = 0.0) -> None:
        left = size
        while left:
            try:
                data = self._stream.read1(min(left, _PIECE))  # type: ignore[attr-defined]
            except TimeoutError as exc:
                raise Hanging("nothing comes") from exc
            except OSError as exc:
                raise Cut(f"receive: {exc}", bytes(body)) from exc
            if not data:
                raise Cut("ended early", bytes(body))
            body += data
            left -= len(data)
            if pause:
                time.sleep(pause)

    def _line(self) -> bytes:
        try:
            return self._stream.readline()
        except TimeoutError as exc:
            raise Hanging("no answer") from exc
        except OSError as exc:
            raise Cut(f"receive: {exc}") from exc


def pattern(source: random.Random, size: int) -> bytes:
    """Return ``size`` bytes that tell one write from another."""
    block = source.randbytes(4096)
    return (block * (size // len(block) + 1))[:size]
