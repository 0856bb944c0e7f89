# SPDX-License-Identifier: Apache-2.0
"""The state that an open file was found in: its size, its validators, whether it is still so."""

import os
import stat
import time

from imageserver.backends.file.failures import failure
from imageserver.core.validators import UNKNOWN_STATE, Validators, validators_of


def size_and_validators(fd: int, found: os.stat_result | None) -> tuple[int, Validators | None]:
    """Return the size in bytes, and what the state can be known by again; None: there is none yet.

    ``found`` are the open file's attributes; None: there is no file. Those of a block device say
    neither: its size is 0 there, and its times are those of its name in /dev.

    Raises:
        OSError: lseek(2) failed.
    """
    if found is None:
        return 0, None
    if stat.S_ISREG(found.st_mode):
        return found.st_size, validators_of(found, time.time_ns())
    return os.lseek(fd, 0, os.SEEK_END), UNKNOWN_STATE


def is_unchanged(path: bytes, fd: int, found: os.stat_result) -> bool:
    """Tell whether a file has not been written to since it was found with these attributes.

    Its ctime does not count: that changes, too, when another file is renamed over this one.

    Raises:
        FileAccessError: it cannot be told; or another error that ``failure`` returns.
    """
    try:
        now = os.fstat(fd)
    except OSError as exc:
        raise failure(path, exc) from exc
    return found.st_mtime_ns == now.st_mtime_ns and found.st_size == now.st_size
