# SPDX-License-Identifier: Apache-2.0
"""A raw file as one end of a transfer: where its data is, its bytes, holes in it.

Reading and writing are by position, so threads share one descriptor. A target begins as one
hole; only data is written to it, so what was a hole on the server is one here.
"""

import ctypes
import errno
import math
import os
import stat
from collections.abc import Iterator
from typing import Protocol, Self

from imageserver.client.failures import LocalFailure
from imageserver.client.plan import MIB, Range, Spans

#: Zeros are found in steps of a page, what a file system can leave out; bytes.
BLOCK = 4096
#: What can be written.
Buffer = bytes | bytearray | memoryview
_ZERO_BLOCK, _ZERO_MIB = bytes(BLOCK), bytes(MIB)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h
_AT_FDCWD, _NOREPLACE = -100, 1  # linux/fcntl.h, linux/fs.h


class Local(Protocol):
    """One image on this side; every method may be called by several threads.

    ``read`` returns exactly the bytes asked for, ``zero`` makes a hole where it can, ``sync``
    returns when all that was written before is on stable storage. None of them keeps Ctrl-C from
    the thread that it reaches, as far as that can be had.
    """

    size: int

    def spans(self) -> Spans:
        """Return where data may be; everything else reads as zeros."""

    def read(self, start: int, length: int) -> bytes:
        """Return bytes of the image."""

    def write(self, start: int, data: Buffer) -> None:
        """Write all of ``data``."""

    def zero(self, start: int, stop: int) -> None:
        """Zero a span."""

    def sync(self, within: float = math.inf) -> None:
        """Bring it to stable storage; give up after so many seconds, where that can be had."""

    def forget_cached(self) -> None:
        """Have what is read next come from the disk, where that can be had."""

    def require_unchanged(self) -> None:
        """Require what is only read not to have been cut, or if it is qcow2 changed, meanwhile."""

    def close(self) -> None:
        """Close it; may be called twice."""

    def abandon(self) -> None:
        """Close it at once: what was not synced may be lost."""


class RawFile:
    """A raw image file, or to read from, a block device."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        self.size = os.lseek(fd, 0, os.SEEK_END)

    @classmethod
    def open(cls, path: str, *, writable: bool = False, ours: os.stat_result | None = None) -> Self:
        """Open a file that exists (``opened``)."""
        return cls(path, opened(path, os.O_RDWR if writable else os.O_RDONLY, ours))

    @classmethod
    def create(cls, path: str, size: int, ours: os.stat_result | None = None) -> Self:
        """Make a file of one hole, in place of any other; a symbolic link is not followed."""
        fd = opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, ours)
        try:
            with local_errors(path):
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd)

    def spans(self) -> Spans:
        """Return where data may be: outside of holes, on a device of zeros."""
        with local_errors(self.path):
            found = Spans(self._holes_left_out() if self._is_file else self._zeros_left_out())
        self.require_unchanged()  # behind the end of a file that was cut, all looks like a hole
        return found

    def _holes_left_out(self) -> Iterator[Range]:
        position = 0
        while position < self.size:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # nothing but a hole to the end
                    return
                if exc.errno != errno.EINVAL:
                    raise
                yield position, self.size  # a file system that cannot tell
                return
            position = min(os.lseek(self.fd, start, os.SEEK_HOLE), self.size)
            yield start, position

    def _zeros_left_out(self) -> Iterator[Range]:
        for start in range(0, self.size, MIB):
            data = self.read(start, min(MIB, self.size - start))
            yield from ((start + first, start + last) for first, last in nonzero(data))

    def read(self, start: int, length: int) -> bytes:
        """Return bytes of the file."""
        with local_errors(self.path):
            data = os.pread(self.fd, length, start)
            while len(data) < length:
                more = os.pread(self.fd, length - len(data), start + len(data))
                if not more:
                    raise self._shorter()
                data += more
        return data

    def write(self, start: int, data: Buffer) -> None:
        """Write all of ``data``."""
        with local_errors(self.path):
            done = os.pwrite(self.fd, data, start)
            while done < len(data):
                done += os.pwrite(self.fd, memoryview(data)[done:], start + done)

    def zero(self, start: int, stop: int) -> None:
        """Make a hole, or write zeros where the file system has none."""
        with local_errors(self.path):
            if _punch(self.fd, start, stop - start):
                return
            for offset in range(start, stop, MIB):
                self.write(offset, _ZERO_MIB[: min(MIB, stop - offset)])

    def sync(self, within: float = math.inf) -> None:
        """Bring the data to stable storage."""
        with local_errors(self.path):
            os.fdatasync(self.fd)

    def forget_cached(self) -> None:
        """Have what is read next come from the disk, as far as the kernel does as it is told."""
        with local_errors(self.path):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def require_unchanged(self) -> None:
        """Require a file to be as long as it was.

        Raises:
            LocalFailure: it is shorter.
        """
        if self._is_file and os.fstat(self.fd).st_size < self.size:
            raise self._shorter()

    def _shorter(self) -> LocalFailure:
        return LocalFailure(f"{self.path} has become shorter than {self.size} bytes")

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def abandon(self) -> None:
        """Close the descriptor."""
        self.close()


def opened(path: str, flags: int, ours: os.stat_result | None = None) -> int:
    """Open a file or block device; return its descriptor.

    Raises:
        LocalFailure: that failed, it is anything else, or not the file that is ``ours``.
    """
    with local_errors(path):  # not to wait for whoever may write into a FIFO
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    found = os.fstat(fd)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        os.close(fd)
        raise LocalFailure(f"{path} is neither a file nor a block device")
    if ours and not os.path.samestat(found, ours):
        os.close(fd)
        raise LocalFailure(f"{path} was replaced by another file meanwhile")
    return fd


def rename_new(old: str, new: str) -> None:
    """Rename, but replace nothing."""
    with local_errors(new):
        if _LIBC.renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _NOREPLACE):
            code = ctypes.get_errno()
            if code not in {errno.EINVAL, errno.ENOSYS, errno.EEXIST}:
                raise OSError(code, os.strerror(code))
            # File systems that cannot do that are asked first: as good as it gets there.
            if code == errno.EEXIST or os.path.lexists(new):
                raise LocalFailure(f"{new} exists: --force replaces it")
            os.rename(old, new)


class local_errors:  # noqa: N801 - used as a function
    """Turns the system's errors about a file into ours; as cheap as that can be."""

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, exc: BaseException | None, _trace: object) -> None:
        if isinstance(exc, OSError):
            raise LocalFailure(f"{self._path}: {exc.strerror or exc}") from exc


def nonzero(data: bytes | bytearray) -> Iterator[Range]:
    """Yield the parts of ``data`` that are not zero, in whole blocks from its start."""
    if data == _ZERO_MIB:
        return
    start = -1
    for position in range(0, len(data), BLOCK):
        # startswith compares in place, and stops at the first byte that differs.
        left = len(data) - position
        zero = _ZERO_BLOCK if left >= BLOCK else _ZERO_BLOCK[:left]
        if data.startswith(zero, position):
            if start >= 0:
                yield start, position
                start = -1
        elif start < 0:
            start = position
    if start >= 0:
        yield start, len(data)


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_LIBC.renameat2.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
]


def _punch(fd: int, start: int, length: int) -> bool:
    """Make a hole; False where the file system has none (Python offers no fallocate modes)."""
    return _LIBC.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, start, length) == 0  # type: ignore[no-any-return]
