# SPDX-License-Identifier: Apache-2.0
"""Disks for tests: one of known bytes that spans many chunks, and big ones of zeros."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tests.system.harness import GUNICORN, Server, program, qemu_nbd, repeatable

#: The smallest that the server takes, so that small images span many pieces.
CHUNK = 4096
SIZE = 20 * CHUNK + 512
OLD = repeatable("old").randbytes(SIZE)
NEW = repeatable("new").randbytes(SIZE)
#: Where the fixture ``disk`` is served, with the old bytes in it.
DISK = "/images/disk"
#: More than all buffers on the way to a client hold.
BIG = 64 << 20


def overwritten(start: int, data: bytes) -> bytes:
    """Return what the disk holds after a write."""
    return OLD[:start] + data + OLD[start + len(data) :]


@contextlib.contextmanager
def offered(
    server: Server, kind: str, name: str, image: Path, *options: str, **more: Any
) -> Iterator[str]:
    """Make a transfer of a file: "nbd", behind qemu-nbd, or "raw", as it is; yield its path.

    ``options`` and ``more`` are qemu-nbd's.
    """
    if kind == "raw":
        yield server.add(name, backend="file", file=str(image), format="raw")
        return
    with qemu_nbd(image, *options, **more) as listening:
        yield server.add(name, socket=str(listening))


def refill(path: Path, data: bytes) -> None:
    """Write a served image anew, and never shorten it: a young qemu-nbd may not know its size yet.

    qemu-nbd listens before it asks how large the image is, and never asks again.
    """
    with path.open("r+b") as file:
        file.write(data)


def sparse(path: Path, size: int) -> Path:
    """Make a file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def with_runtime_of_2_mib(server: Server) -> Server:
    """Give a server that has not been started a file system of its own for its runtime directory.

    It is mounted where nobody else sees it, and gone with the server. ``needs("mounts")``.
    """
    server.runtime.mkdir(0o700)
    mount = f"mount -t tmpfs -o size=2m,mode=0700 tmpfs {server.runtime} && exec {GUNICORN}"
    server.command = [program("unshare"), "--mount", "sh", "-c", mount]
    return server


def runtime_of(server: Server) -> Path:
    """Return a path to the runtime directory as the running server sees it."""
    return Path(f"/proc/{server.process.pid}/root{server.runtime}")


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while _takes(file):
            pass


def _takes(file: IO[bytes]) -> bool:
    try:
        return file.write(bytes(4096)) > 0
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        return False
