# SPDX-License-Identifier: Apache-2.0
"""What is run, and when its terminal is looked at. One server, gone afterwards.

Ports differ from run to run: what is shown has the default ones.
"""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.processes import free_port, wait_until
from lab.servers import Server, nbdkit, qemu_img, qemu_io, qemu_nbd
from rich.text import Text

from capturing.browser import photograph
from capturing.terminal import Program

_MIB, _GIB = 1 << 20, 1 << 30
_PORT, _ADMIN_PORT = 54323, 54324
_IMAGECTL = [sys.executable, "-m", "imageserver.client"]
_PERCENT = re.compile(r"([0-9]+)%")
#: Bytes of data of the large images, and seconds that it takes to move them.
_FULL, _QUICK = (600 * _MIB, 6), (24 * _MIB, 1)
#: The same while ``top`` is looked at, however long all of it takes to start.
_TOP_SECONDS = 20
_MIDDLE_PERCENT = 55
#: For how long the operators' page is looked at: with large images, in seconds.
_LOOK_SECONDS = 9
#: Operations that run while ``top`` is looked at.
_TRANSFERS, _READS = 3, 2
#: What the small image holds, and what has changed since its bitmap was made: (offset, bytes).
_BASE = ((0, 96), (160, 8), (256, 300), (700, 64), (900, 40), (1000, 16))
_CHANGES = ((4, 6), (264, 2), (300, 40), (720, 1), (950, 3))


@dataclass(frozen=True, slots=True)
class Shot:
    """What a terminal showed below the commands that were typed."""

    shown: tuple[tuple[str, Text], ...]
    title: str = ""
    """The title of a drawing; none: there is no drawing."""

    @property
    def text(self) -> str:
        """Return it for a code block."""
        parts = []
        for command, shown in self.shown:
            lines = [line.rstrip() for line in shown.plain.splitlines()]
            parts += [f"$ {command}", *lines]
        return "\n".join(parts).rstrip() + "\n"


class World:
    """A server with an image that is mapped and one that is slow to read."""

    def __init__(self, home: Path, server: Server, admin: int, data: int, images: Path) -> None:
        """``images``: where pictures of the operators' page are to be."""
        self._home, self._server, self._admin, self._data = home, server, admin, data
        self._images = images
        self._renamed = {f":{server.port}": f":{_PORT}", f":{admin}": f":{_ADMIN_PORT}"}

    def captures(self) -> Iterator[tuple[str, Shot]]:
        """Yield every shot by name."""
        yield "info", Shot((self._run("info", "--extents", "$url"),))
        yield "map", Shot((self._run("map", "--context", "dirty", "$url"),))
        yield "check", Shot((self._run("check", "$url"),))
        yield from self._downloads()
        yield "top", self._top()

    def _run(self, *words: str) -> tuple[str, Text]:
        """Run imagectl to its end."""
        with self._started(*words) as running:
            return self._typed(words), running.finish()

    def _downloads(self) -> Iterator[tuple[str, Shot]]:
        words = ("download", "$url", "disk.raw")
        with self._started(*words, image="slow") as running:
            middle = running.until(_is_half_way)
            running.signal(signal.SIGINT)
            interrupted = running.finish()
        typed = self._typed(words)
        yield "download", Shot(((typed, middle),), "imagectl download")
        with self._started(*words, image="slow") as running:
            finished = running.finish()
        yield "resume", Shot(((typed, interrupted), (typed, finished)))

    def _top(self) -> Shot:
        (self._home / "disk.raw").unlink()
        (self._home / "rate").write_text(str(8 * self._data // _TOP_SECONDS), encoding="ascii")
        source = self._home / "other.raw"
        with source.open("wb") as file:
            file.truncate(self._data)
            file.write(os.urandom(self._data // 2))
        download = ("download", "$url", "disk.raw", "-n", "2")
        upload = ("upload", "other.raw", "$url", "-n", "1")
        with self._started(*download, image="slow"):
            wait_until(self._both_read)  # the oldest stands first
            with (
                self._started(*upload, image="target"),
                self._started("top", "$admin", "--interval", "0.3") as top,
            ):
                shown = top.until(_shows_all)
                here, there = (f"127.0.0.1:{port}" for port in (self._admin, _ADMIN_PORT))
                seconds = _LOOK_SECONDS * self._data / _FULL[0]
                photograph(here, there, "slow", seconds, self._images)
        return Shot(((self._typed(("top", "$admin")), shown),), "imagectl top")

    def _both_read(self) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._admin}/status") as answer:
            return len(json.load(answer)["transfers"]) == _READS

    def _started(self, *words: str, image: str = "demo") -> Program:
        places = {
            "$url": f"http://127.0.0.1:{self._server.port}/images/{image}",
            "$admin": f"http://127.0.0.1:{self._admin}",
        }
        command = [*_IMAGECTL, *(places.get(word, word) for word in words)]
        return Program(command, self._home, self._renamed)

    def _typed(self, words: tuple[str, ...]) -> str:
        admin = f"http://127.0.0.1:{_ADMIN_PORT}"
        return " ".join(["imagectl", *words]).replace("$admin", admin)


@contextlib.contextmanager
def world(images: Path, *, quick: bool) -> Iterator[World]:
    """Start everything."""
    data, seconds = _QUICK if quick else _FULL
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="capture-")))
        admin = free_port()
        bind = f"127.0.0.1:{admin}"
        server = stack.enter_context(Server(home, admin_bind=bind, max_writers=2))
        demo = qemu_nbd(_demo(home), "--discard=unmap", "--bitmap=backup0", fmt="qcow2")
        server.add("demo", socket=str(stack.enter_context(demo)), export_bitmap="backup0")
        _large(home / "slow.raw", data)
        with (home / "target.raw").open("wb") as file:
            file.truncate(data)
        for name in ("slow", "target"):
            options = ("--filter=rate", "file", str(home / f"{name}.raw"))
            limits = (f"rate={8 * data // seconds}", f"rate-file={home}/rate", "burstiness=0.2")
            sock = stack.enter_context(nbdkit(home / f"{name}.sock", *options, *limits))
            server.add(name, socket=str(sock))
        yield World(home, server, admin, data, images)


def _demo(home: Path) -> Path:
    """Make a qcow2 image of 1 GiB with some data, a bitmap, and changes since."""
    disk = home / "demo.qcow2"
    qemu_img("create", "-f", "qcow2", disk, _GIB)
    qemu_io(disk, "qcow2", *(f"write -P 1 {start}M {length}M" for start, length in _BASE))
    qemu_img("bitmap", "--add", disk, "backup0")
    qemu_io(disk, "qcow2", *(f"write -P 2 {start}M {length}M" for start, length in _CHANGES))
    qemu_io(disk, "qcow2", "write -z 320M 30M")
    return disk


def _large(path: Path, data: int) -> None:
    """Make a sparse image of random data in two parts."""
    with path.open("wb") as file:
        for start in (0, 3 * data):
            file.seek(start)
            for _ in range(0, data // 2, _MIB):
                file.write(os.urandom(_MIB))
        file.truncate(5 * data)


def _is_half_way(screen: str) -> bool:
    found = _PERCENT.findall(screen)
    return bool(found) and int(found[-1]) >= _MIDDLE_PERCENT


def _shows_all(screen: str) -> bool:
    """Tell whether reads and a write have gone some way."""
    lines = screen.splitlines()
    moving = [line for line in lines if re.search(r" [1-9][0-9]* %", line)]
    return len(moving) >= _TRANSFERS and "write" in screen
