# SPDX-License-Identifier: Apache-2.0
"""A raw file as one end of a transfer: where its data is, its bytes, holes in it.

Reading and writing are by position, so threads share one descriptor. A target begins as one
hole; only data is written to it, so what was a hole on the server is one here.
"""

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import stat
from collections.abc import Callable, Iterator
from typing import Protocol, Self

from imageserver.client.errors import LocalFailure
from imageserver.client.plan import MIB, Range, Spans

#: Zeros are found in steps of a page, what a file system can leave out; bytes.
BLOCK = 4096
#: What a qcow2 file begins with.
QCOW2_MAGIC = b"QFI\xfb"
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

    def close(self) -> None:
        """Close it; may be called twice."""

    def abandon(self) -> None:
        """Close it at once: what was not synced may be lost."""


class RawFile:
    """A raw image file, or to read from, a block device."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            os.close(fd)
            raise LocalFailure(f"{path} is neither a file nor a block device")
        self._is_file = stat.S_ISREG(mode)
        self.size = os.lseek(fd, 0, os.SEEK_END)

    @classmethod
    def open(cls, path: str, *, writable: bool = False) -> Self:
        """Open a file that exists."""
        with local_errors(path):
            return cls(path, os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))

    @classmethod
    def create(cls, path: str, size: int) -> Self:
        """Make a file of one hole, in place of any other; a symbolic link is not followed."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with local_errors(path):
            fd = os.open(path, flags, 0o666)
            os.ftruncate(fd, size)
            return cls(path, fd)

    def spans(self) -> Spans:
        """Return where data may be: outside of holes, on a device of zeros."""
        with local_errors(self.path):
            return Spans(self._holes_left_out() if self._is_file else self._zeros_left_out())

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
                    raise LocalFailure(f"{self.path} has become shorter than {self.size} bytes")
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

    def close(self) -> None:
        """Close the descriptor; may be called twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def abandon(self) -> None:
        """Close the descriptor."""
        self.close()


@contextlib.contextmanager
def claimed(path: str, *, is_part: bool) -> Iterator[Callable[[], None]]:
    """Keep a second download of the same file out; what is yielded requires it to be still there.

    A part is made if there is none, and is gone again if nothing came into it.
    """
    fd = _locked(path, is_part=is_part)

    def check() -> None:
        with local_errors(path):
            if not _is_at(fd, path, is_part=is_part):
                raise LocalFailure(f"{path} was replaced by another file meanwhile")

    try:
        yield check
    except BaseException:
        if is_part and not os.fstat(fd).st_size:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def unchanged(path: str) -> Iterator[Callable[[], bool]]:
    """Keep downloads into a file out; what is yielded tells whether it is as it was."""
    with local_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with local_errors(path):
            _lock(fd, path, fcntl.LOCK_SH)
            before = os.fstat(fd)

        def is_same() -> bool:
            with local_errors(path):
                now = os.stat(path)
            return os.path.samestat(before, now) and (before.st_size, before.st_mtime_ns) == (
                now.st_size,
                now.st_mtime_ns,
            )

        yield is_same
    finally:
        os.close(fd)


def _lock(fd: int, path: str, how: int) -> None:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise LocalFailure(f"{path}: another download of this file is running") from exc


def _locked(path: str, *, is_part: bool) -> int:
    """Open and lock what is at ``path`` once the lock is held: it may have been renamed before."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_NOFOLLOW if is_part else 0)
    while True:
        if is_part and os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise LocalFailure(f"{path} is no regular file: remove it first")
        with local_errors(path):
            fd = os.open(path, flags, 0o666)
        try:
            _lock(fd, path, fcntl.LOCK_EX)
            if _is_at(fd, path, is_part=is_part):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: str, *, is_part: bool) -> bool:
    return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=not is_part))


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
