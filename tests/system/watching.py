# SPDX-License-Identifier: Apache-2.0
"""An operator, or a program of one: it asks a server's admin listener. And a server to ask."""

import contextlib
import hashlib
import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.system.harness import Answer, Server, exchange


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Admin:
    """The admin listener at a port of the loopback interface, or at a Unix socket."""

    def __init__(self, place: int | Path) -> None:
        self.place = place

    def __repr__(self) -> str:  # in the names of tests
        return "tcp" if isinstance(self.place, int) else "unix"

    @property
    def bind(self) -> str:
        """The address as IMAGESERVER_ADMIN_BIND takes it."""
        tcp = isinstance(self.place, int)
        return f"127.0.0.1:{self.place}" if tcp else f"unix:{self.place}"

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        if isinstance(self.place, int):
            return http.client.HTTPConnection("127.0.0.1", self.place, timeout=timeout)
        return _UnixConnection(str(self.place), timeout)

    def ask(self, path: str, method: str = "GET", timeout: float = 30) -> Answer:
        with contextlib.closing(self.connect(timeout)) as connection:
            return exchange(connection, method, path)

    def status(self) -> Any:
        answer = self.ask("/status")
        assert answer.status == 200
        return answer.json

    def transfers(self) -> list[Any]:
        return list(self.status()["transfers"])

    def metrics(self) -> dict[str, float]:
        """Return every sample, as ``name{label="value",...}`` without ``imageserver_``."""
        answer = self.ask("/metrics")
        assert answer.status == 200
        lines = [line for line in answer.body.decode().splitlines() if not line.startswith("#")]
        pairs = [line.removeprefix("imageserver_").rsplit(" ", 1) for line in lines]
        return {name: float(value) for name, value in pairs}


def short(transfer: str) -> str:
    """Return how an id appears over TCP (docs/api.md)."""
    return hashlib.sha256(transfer.encode()).hexdigest()[:12]


@contextlib.contextmanager
def watched(home: Path, big: dict[str, str], *admins: Admin) -> Iterator[Server]:
    """Run a server with ``big`` and ``file``, a file that is not there yet; all these may ask."""
    binds = ",".join(admin.bind for admin in admins)
    with Server(home, admin_bind=binds, max_writers=2) as running:
        running.add("big", **big)
        running.add("file", backend="file", file=str(home / "file"))
        yield running
