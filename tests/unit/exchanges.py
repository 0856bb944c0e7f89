# SPDX-License-Identifier: Apache-2.0
"""A connection as the server has it, its client, and an application that answers as told."""

import select
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gunicorn.config import Config

from imageserver.images.probing import Asking
from imageserver.server.connection import Connection
from imageserver.server.environ import Gateway
from imageserver.server.exchange import serve
from imageserver.server.wire import Wire

OK = "200 OK"


@dataclass
class App:
    """A WSGI application that answers as told and remembers its environment."""

    status: str = OK
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("Content-Length", "3")])
    pieces: Iterable[bytes | memoryview] = (b"abc",)
    look: Callable[[dict[str, Any]], object] = lambda _: None
    environ: dict[str, Any] = field(default_factory=dict)
    seen: object = None

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes | memoryview]:
        self.environ = environ
        self.seen = self.look(environ)
        start_response(self.status, self.headers)
        return self.pieces


class Line:
    """A connection, our end as the server has it, and the client's."""

    def __init__(self, ours: socket.socket, client: socket.socket) -> None:
        self.conn = Connection(ours, ("192.0.2.1", 4321), ("127.0.0.1", 80))
        self.client = client
        cfg = Config()
        cfg.set("http_parser", "python")
        self.gateway = Gateway(cfg)

    def ask(
        self, app: App, head: str | bytes = "GET /x HTTP/1.1\r\nHost: x\r\n\r\n", **flags: Any
    ) -> bool:
        self.conn.buffer += head if isinstance(head, bytes) else head.encode()
        wire = Wire(self.conn.sock, 5.0)
        last, asking = flags.get("last", False), flags.get("asking", Asking.NOW)
        return serve(self.conn, wire, app, self.gateway, lambda: last, asking=asking)

    def answer(self) -> tuple[str, dict[str, str], bytes]:
        """Return status line, headers and body of what has been sent, whatever its framing."""
        assert select.select([self.client], [], [], 0)[0]
        head, _, body = self.client.recv(1 << 20).partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        return first, dict(line.split(": ", 1) for line in lines), body


def put(length: int, extra: str = "") -> str:
    """Return the head of an upload."""
    return f"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{extra}\r\n"
