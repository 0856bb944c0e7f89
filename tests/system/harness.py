# SPDX-License-Identifier: Apache-2.0
"""Real servers for tests (``scripts/lab`` runs them), and an HTTP client that is not our own.

Imports nothing of the package, but for what ``lab`` says.
"""

import contextlib
import errno
import http.client
import json
import os
import random
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.processes import ROOT, free_port, process, program, wait_until, with_sbin
from lab.servers import GUNICORN, QemuNbd, listens, nbdkit, qemu_img, qemu_io, qemu_nbd
from lab.servers import Server as LabServer

__all__ = [
    "GUNICORN",
    "ROOT",
    "Answer",
    "QemuNbd",
    "Server",
    "exchange",
    "free_port",
    "listens",
    "nbdkit",
    "process",
    "program",
    "qemu_img",
    "qemu_io",
    "qemu_nbd",
    "remove",
    "repeatable",
    "wait_until",
    "with_sbin",
]


def remove(directory: Path) -> None:
    """Remove a directory in which a server may make a file at the same moment."""

    def is_removed() -> bool:
        try:
            shutil.rmtree(directory)
        except OSError as exc:
            if exc.errno != errno.ENOTEMPTY:
                raise
            return False
        return True

    wait_until(is_removed)


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])

    @property
    def refusal(self) -> tuple[int, str]:
        """Return status and message of an error that looks as every error must (docs/api.md)."""
        common = {
            "Accept-Ranges": "bytes",
            "Access-Control-Allow-Methods": "GET, PUT, OPTIONS",
            "Cache-Control": "no-store",
            "Content-Type": "application/json",
            "Content-Length": str(len(self.body)),
        }
        assert {name: self.headers[name] for name in common} == common
        message = self.error
        assert self.body == json.dumps({"error": message}, separators=(",", ":")).encode()
        return self.status, message

    @property
    def fields(self) -> dict[str, str]:
        """The header fields, lower-case, without those of any HTTP server's own."""
        own = {"server", "date", "connection", "x-request-id"}
        return {k.lower(): v for k, v in self.headers.items() if k.lower() not in own}


class Server(LabServer):
    """A running image server, and clients of it."""

    def holders(self) -> list[str]:
        """Return who holds a slot: a client sees the end of its answer just before it is free."""
        if super().holders():
            time.sleep(0.1)
        return super().holders()

    def worker_of(self, sock: socket.socket, workers: Sequence[int] = ()) -> int:
        """Return the pid of the worker, of these or of all, that has accepted a connection."""
        client, server = f":{sock.getsockname()[1]:04X}", f":{self.port:04X}"

        def find() -> int:
            lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            inodes = {f[9] for f in lines if f[1].endswith(server) and f[2].endswith(client)}
            for pid in workers or self.worker_pids():
                for fd in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        if os.readlink(fd)[8:-1] in inodes:
                            return pid
            return 0

        return wait_until(find)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        """Make one request on a connection of its own."""
        with contextlib.closing(self.connect(timeout)) as connection:
            return exchange(connection, method, path, body, headers)

    def bare(self, method: str, path: str, *fields: str, body: bytes = b"") -> Answer:
        """Make a request of exactly these header fields, then say that nothing more comes."""
        head = "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", "Host: x", *fields))
        with self.raw(head.encode() + b"\r\n" + body) as sock:
            sock.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(sock)
            response.begin()
            return Answer(response.status, response.headers, response.read())

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def raw(self, data: bytes = b"", timeout: float = 30) -> socket.socket:
        """Open a bare socket and send ``data``."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        sock.sendall(data)
        return sock


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Make one request on an open connection."""
    connection.request(method, path, body, dict(headers or {}))
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def repeatable(seed: object) -> random.Random:
    """Return a source of the same random numbers each time."""
    return random.Random(str(seed))  # noqa: S311 - test data, not secrets
