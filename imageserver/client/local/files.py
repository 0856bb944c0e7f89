# SPDX-License-Identifier: Apache-2.0
"""What is done to files of any format: opening, renaming, syncing names, the system's errors.

An error of the system becomes ``LocalFailure``, which names the file.
"""

import contextlib
import errno
import functools
import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imageserver.client.failures import LocalFailure

if TYPE_CHECKING:
    import ctypes

#: Bytes to be written.
Buffer = bytes | bytearray | memoryview
_AT_FDCWD, _NOREPLACE = -100, 1  # linux/fcntl.h, linux/fs.h
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


def opened(path: str, flags: int, ours: os.stat_result | None = None) -> int:
    """Open a file or block device; return its descriptor.

    Raises:
        LocalFailure: it cannot be opened, is something else, or is not the file ``ours``.
    """
    with local_errors(path):  # O_NONBLOCK: the open of a FIFO would wait for its other end
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    found = os.fstat(fd)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        os.close(fd)
        raise LocalFailure(f"{path} is neither a file nor a block device")
    if ours and not os.path.samestat(found, ours):
        os.close(fd)
        raise LocalFailure(f"{path} was replaced by another file meanwhile")
    return fd


def read_at(fd: int, start: int, length: int) -> bytes:
    """Return bytes of a file; fewer only at its end."""
    data = os.pread(fd, length, start)
    while len(data) < length and (more := os.pread(fd, length - len(data), start + len(data))):
        data += more
    return data


def punch_hole(fd: int, start: int, stop: int) -> bool:
    """Make a hole; return False where the file system has none."""
    mode = _KEEP_SIZE | _PUNCH_HOLE
    return _libc().fallocate(fd, mode, start, stop - start) == 0  # type: ignore[no-any-return]


def rename_new(old: str, new: str) -> None:
    """Rename a file; fail if ``new`` exists."""
    import ctypes  # noqa: PLC0415 - as in _libc

    ends = _AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new)
    with local_errors(new):
        if _libc().renameat2(*ends, _NOREPLACE):
            code = ctypes.get_errno()
            if code not in {errno.EINVAL, errno.ENOSYS, errno.EEXIST}:
                raise OSError(code, os.strerror(code))
            # A file system without RENAME_NOREPLACE: a look before the rename has to do.
            if code == errno.EEXIST or os.path.lexists(new):
                raise LocalFailure(f"{new} exists: --force replaces it")
            os.rename(old, new)


@functools.cache
def _libc() -> "ctypes.CDLL":
    """Return the C library: Python offers neither ``fallocate``'s modes nor ``renameat2``."""
    import ctypes  # noqa: PLC0415 - takes time, and many transfers do without

    libc = ctypes.CDLL(None, use_errno=True)
    number, path = ctypes.c_int, ctypes.c_char_p
    libc.fallocate.argtypes = [number, number, ctypes.c_int64, ctypes.c_int64]
    libc.renameat2.argtypes = [number, path, number, path, ctypes.c_uint]
    return libc


class local_errors:  # noqa: N801 - used as a function
    """Turns the system's errors about a file into ``LocalFailure``.

    A class, since a generator would cost more: this is entered for each MiB.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        if isinstance(exc, OSError):
            raise LocalFailure(f"{self._path}: {exc.strerror or exc}") from exc


class Loss:
    """Whether a sync of a file has failed: then each later one fails.

    The kernel tells once that it could not write, and drops what it had (fsync(2)): a second try
    would succeed without it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_known = False

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Sync within this block."""
        if self._is_known:
            raise LocalFailure(f"{self._path}: what was written before is lost")
        try:
            yield
        except LocalFailure:
            self._is_known = True
            raise


def sync_folder(path: str) -> None:
    """Bring the directory entry of a file to stable storage."""
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
