# SPDX-License-Identifier: Apache-2.0
"""Things that die on demand, and clients that notice what happened to them."""

import contextlib
import http.client
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tests.system.harness import Server, listens, program, wait_until


class Nbd:
    """A qemu-nbd that serves a raw image and may be killed, stopped and started again."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self.socket = image.with_suffix(".sock")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = [program("qemu-nbd"), "--shared=32", "--persistent", "--format=raw"]
        command += [f"--socket={self.socket}", str(self.image)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        wait_until(lambda: listens(self.socket))

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it without a warning; its socket stays behind, as it does after a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Answer nothing for the time being."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()


def reset_on_close(sock: socket.socket) -> None:
    """Make ``close`` send RST: the client vanishes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


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
