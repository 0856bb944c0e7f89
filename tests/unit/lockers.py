# SPDX-License-Identifier: Apache-2.0
"""Image locks in a directory of our own, and a process that holds one."""

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.errors import ImageBusy
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.locks import ImageLocks
from tests.unit.processes import holding

DISK = NbdImage("/run/disk.sock", "vda")
OTHER = NbdImage("/run/disk.sock", "vdb")

_HOLD = """
import sys
from imageserver.runtime.locks import ImageLocks
from imageserver.runtime.directory import KeptDirectory
from imageserver.backends.nbd.kind import NbdImage
locks = ImageLocks(KeptDirectory(sys.argv[1]), lambda *_, **__: False)
lock = locks.acquire(NbdImage("/run/disk.sock", "vda"))
print("held", flush=True)
sys.stdin.readline()
lock.release()
"""


def holder(directory: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run a process that holds ``DISK`` until it gets a line."""
    return holding(_HOLD, directory)


def believes(_key: str, *, to_sharers: bool) -> bool:
    """Say of every holder of an image that it keeps it."""
    return False


def locks_in(directory: Path, gives_way: Callable[..., bool] = believes) -> ImageLocks:
    return ImageLocks(KeptDirectory(str(directory)), gives_way)


def is_busy(images: ImageLocks) -> bool:
    try:
        images.acquire(DISK).release()
    except ImageBusy:
        return True
    return False


def age(directory: Path, seconds: float) -> None:
    then = time.time() - seconds
    for file in directory.iterdir():
        os.utime(file, (then, then))
