# SPDX-License-Identifier: Apache-2.0
"""Disks for tests: one of known bytes that spans many chunks, and big ones of zeros."""

from pathlib import Path

from tests.system.harness import repeatable

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
