# SPDX-License-Identifier: Apache-2.0
"""Things that die on demand, and clients that notice what happened to them."""

import contextlib
import http.client
import socket
import threading
from typing import Self

from lab.servers import QemuNbd as Nbd
from lab.wire import reset_on_close

from tests.system.harness import Server

__all__ = ["Nbd", "Prober", "reset_on_close", "rest_of"]


def rest_of(sock: socket.socket, size: int = 1 << 40) -> bytes:
    """Read ``size`` bytes, or until the other side ends or cuts the connection."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(min(1 << 20, size - len(received))):
            received += piece
    return bytes(received)


class Prober(threading.Thread):
    """Asks OPTIONS on a fresh connection over and over, and keeps what was not a 200."""

    def __init__(self, server: Server, path: str) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._path = path
        self._done = threading.Event()
        self.answered = 0
        self.failed: list[str] = []

    def run(self) -> None:
        while not self._done.is_set():
            try:
                status = self._server.request("OPTIONS", self._path).status
            except (OSError, http.client.HTTPException) as exc:
                self.failed.append(repr(exc))
            else:
                self.answered += 1
                if status != 200:
                    self.failed.append(str(status))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._done.set()
        self.join(40)
