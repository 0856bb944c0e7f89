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
from imageserver.core.slots import Owner
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.locks import ImageLocks
from imageserver.runtime.processes import is_exiting, owner_of
from tests.unit.processes import holding

DISK = NbdImage("/run/disk.sock", "vda")
OTHER = NbdImage("/run/disk.sock", "vdb")

_HOLD = """
import os, sys
from imageserver.runtime.locks import ImageLocks
from imageserver.runtime.processes import is_exiting, owner_of
from imageserver.runtime.directory import KeptDirectory
from imageserver.backends.nbd.kind import NbdImage
locks = ImageLocks(KeptDirectory(sys.argv[1]), is_exiting, lambda: owner_of(os.getpid()))
lock = locks.acquire(NbdImage("/run/disk.sock", "vda"))
print("held", flush=True)
sys.stdin.readline()
lock.release(settled=True)
"""


def holder(directory: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run a process that holds ``DISK`` until it gets a line."""
    return holding(_HOLD, directory)


def me() -> Owner:
    owner = owner_of(os.getpid())
    assert owner is not None
    return owner


def locks_in(directory: Path, is_exiting: Callable[[Owner], bool] = is_exiting) -> ImageLocks:
    return ImageLocks(KeptDirectory(str(directory)), is_exiting, me)


def is_busy(images: ImageLocks) -> bool:
    try:
        images.acquire(DISK).release(settled=True)
    except ImageBusy:
        return True
    return False


def age(directory: Path, seconds: float) -> None:
    then = time.time() - seconds
    for file in directory.iterdir():
        os.utime(file, (then, then))
