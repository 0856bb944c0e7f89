# SPDX-License-Identifier: Apache-2.0
"""Images, and the NBD servers behind the proxy that come and go with them."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from lab.model import Model
from lab.processes import wait_until
from lab.servers import QemuNbd, listens, qemu_img

SIZE = 8 << 20
_PROXY = Path(__file__).with_name("proxy.py")


class Image:
    """An image, its model, and what makes it a transfer."""

    is_nbd = False
    fmt = "raw"

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.path = directory / name
        self.model = Model(SIZE, is_whole=not self.is_nbd)

    def transfer(self) -> dict[str, str]:
        """Return the fields of its transfer file."""
        return {"backend": "file", "file": str(self.path)}

    def start(self) -> None:
        """Make it."""
        self.path.write_bytes(bytes(SIZE))

    def stop(self) -> None:
        """End what serves it."""


class NbdImage(Image):
    """An image behind qemu-nbd. Raw ones survive SIGKILL of that; qcow2 needs a clean end."""

    is_nbd = True

    def __init__(self, name: str, directory: Path, *, fmt: str) -> None:
        super().__init__(name, directory)
        self.fmt = fmt
        self.front = directory / f"{name}.sock"
        self.lock = threading.Lock()
        self.server = QemuNbd(self.path, fmt=fmt, sock=directory / f"{name}.nbd")

    def transfer(self) -> dict[str, str]:
        """Return the fields of its transfer file: clients go through the proxy."""
        return {"socket": str(self.front)}

    def start(self) -> None:
        """Make the image where there is none, and serve it."""
        if not self.path.exists():
            qemu_img("create", "-q", "-f", self.fmt, self.path, SIZE)
        self.server.start()

    def stop(self) -> None:
        """End the NBD server: at once where the format bears it."""
        if self.fmt == "raw":
            self.server.kill()
        self.server.stop()


class Proxy:
    """The proxy in front of all NBD images."""

    def __init__(self, images: list[NbdImage], readers: int, writers: int, chunk: int) -> None:
        command = [sys.executable, str(_PROXY), f"--readers={readers}", f"--writers={writers}"]
        command.append(f"--chunk={chunk}")
        command += [f"{image.front}={image.server.socket}" for image in images]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_until(lambda: all(listens(image.front) for image in images))

    def report(self) -> dict[str, Any]:
        """End it; return what it has seen."""
        self._process.send_signal(signal.SIGTERM)
        seen: dict[str, Any] = json.loads(self._process.communicate(timeout=30)[0])
        return seen

    def stop(self) -> None:
        """End it, whatever it has seen."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
