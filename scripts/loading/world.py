# SPDX-License-Identifier: Apache-2.0
"""A server with images of every kind, and locust over them; all of it gone afterwards.

    to read     two qcow2 images behind qemu-nbd with a dirty bitmap, a file
    to write    two raw images behind qemu-nbd, a file

Limits are lower than by default, so that the users meet them.
"""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.model import pattern
from lab.processes import ROOT
from lab.servers import Server, qemu_img, qemu_io, qemu_nbd, settings_in

LOCUSTFILE = ROOT / "scripts" / "locustfile.py"
_MIB = 1 << 20
_SIZE = 32 * _MIB
#: What backups find: data in the base, and what has changed since the bitmap was made.
_DATA = ((0, 4 * _MIB), (6 * _MIB, 65536), (16 * _MIB, 5 * _MIB))
_CHANGES = ((1 * _MIB, 3 * 65536), (10 * _MIB, 2 * _MIB), (20 * _MIB, 4096))
_FILE_SIZE = 8 * _MIB
_WRITTEN_SIZE = 8 * _MIB
#: Beyond the run itself: to start, and to let every user finish.
_PATIENCE_SECONDS = 150.0
_FIGURES = "figures"  # locust adds .json


@dataclass(slots=True)
class World:
    """A running server, and what locust is told of its images."""

    server: Server
    control_socket: Path
    read: list[str] = field(default_factory=list)
    write: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> list[str]:
        """Return the options of the locustfile."""
        return [
            f"--host=http://127.0.0.1:{self.server.port}",
            f"--read={' '.join(self.read)}",
            f"--write={' '.join(self.write)}",
            f"--config-dir={self.server.config}",
            f"--control-socket={self.control_socket}",
        ]

    def strays(self) -> list[str]:
        """Return what must not be left in the config directory."""
        known = {word.partition("=")[0] for word in self.read} | set(self.write)
        left = sorted(path.name for path in self.server.config.iterdir())
        return [f"transfer file left: {name}" for name in left if name not in known]


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Start everything; ``IMAGESERVER_*`` of our environment go to the server."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="load-")))
        settings: dict[str, object] = {"max_readers": 4, "control_socket": home / "control"}
        settings |= settings_in(os.environ)
        server = stack.enter_context(Server(home, **settings))
        made = World(server, Path(str(settings["control_socket"])))
        source = random.Random(6)
        for name in ("disk0", "disk1"):
            _tracked(stack, made, home / name, source)
        _file(made, home / "file", pattern(source, _FILE_SIZE))
        for name in ("restored0", "restored1"):
            _empty(stack, made, home / name)
        (home / "replaced").write_bytes(bytes(_FILE_SIZE))
        server.add("replaced", backend="file", file=str(home / "replaced"))
        made.write.append("replaced")
        yield made


def _tracked(stack: contextlib.ExitStack, made: World, path: Path, source: random.Random) -> None:
    """An image with a bitmap, and files with what it contains and has contained."""
    base, content, image = (path.with_suffix(suffix) for suffix in (".base", ".raw", ".qcow2"))
    data = bytearray(_SIZE)
    _overwrite(data, _DATA, source)
    base.write_bytes(data)
    qemu_img("convert", "-q", "-f", "raw", "-O", "qcow2", base, image)
    qemu_img("bitmap", "--add", image, "b0")
    _overwrite(data, _CHANGES, source)
    content.write_bytes(data)
    for start, size in _CHANGES:
        piece = path.with_suffix(".piece")
        piece.write_bytes(data[start : start + size])
        qemu_io(image, "qcow2", f"write -q -s {piece} {start} {size}")
    sock = stack.enter_context(qemu_nbd(image, "--read-only", "--bitmap=b0", fmt="qcow2"))
    made.server.add(path.name, socket=str(sock), export_bitmap="b0")
    made.read.append(f"{path.name}={content}={base}")


def _overwrite(data: bytearray, places: tuple[tuple[int, int], ...], source: random.Random) -> None:
    for start, size in places:
        data[start : start + size] = pattern(source, size)


def _file(made: World, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    copy = path.with_suffix(".raw")
    copy.write_bytes(data)
    made.server.add(path.name, backend="file", file=str(path), read_only=True)
    made.read.append(f"{path.name}={copy}")


def _empty(stack: contextlib.ExitStack, made: World, path: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", path, _WRITTEN_SIZE)
    sock = stack.enter_context(qemu_nbd(path, "--discard=unmap"))
    made.server.add(path.name, socket=str(sock))
    made.write.append(path.name)


def locust(
    parameters: list[str], seconds: int, users: int, directory: Path, html: Path | None
) -> int:
    """Run locust without a web page; return its exit status."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"]
    command += [f"--users={users}", f"--spawn-rate={users}", f"--run-time={seconds}s"]
    # With a file for its figures, locust leaves the tables to us.
    command += ["--loglevel=WARNING", f"--json-file={directory / _FIGURES}", "--only-summary"]
    command += [f"--html={html.resolve()}"] if html else []
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("LOCUST_", "LOAD_"))}
    done = subprocess.run(
        [*command, *parameters],
        stdin=subprocess.DEVNULL,
        env=environ,
        cwd=directory,
        check=False,
        timeout=seconds + _PATIENCE_SECONDS,
    )
    return done.returncode


def figures(directory: Path) -> list[dict[str, Any]]:
    """Return what locust has counted, by kind of request; nothing if it did not come so far."""
    try:
        found: list[dict[str, Any]] = json.loads(
            (directory / f"{_FIGURES}.json").read_text("utf-8")
        )
    except (OSError, ValueError):
        return []
    return found
