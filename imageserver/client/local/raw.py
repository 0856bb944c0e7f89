# SPDX-License-Identifier: Apache-2.0
"""A raw image file, or a block device that is read: its bytes, and where its holes are.

Reading and writing are by position, so threads share one descriptor. A new file begins as one
hole and only data is written to it: what was a hole on the server is one here.
"""

import errno
import math
import os
import stat
from collections.abc import Iterator
from typing import Self

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import Buffer, Loss, local_errors, opened, punch_hole, read_at
from imageserver.client.plan import MIB, Range, Spans

#: Zeros are found in blocks of a page, the smallest hole of file systems; in bytes.
BLOCK = 4096
_ZERO_BLOCK, _ZERO_MIB = bytes(BLOCK), bytes(MIB)


class RawFile:
    """A raw image file; or a block device, which is only read."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._loss = Loss(path)
        self._is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        with local_errors(path):
            self.size = os.lseek(fd, 0, os.SEEK_END)

    @classmethod
    def open(cls, path: str, *, writable: bool = False, ours: os.stat_result | None = None) -> Self:
        """Open a file that exists (``opened``)."""
        return cls(path, opened(path, os.O_RDWR if writable else os.O_RDONLY, ours))

    @classmethod
    def create(cls, path: str, size: int, ours: os.stat_result | None = None) -> Self:
        """Make a file that is one hole, replacing its content; a symbolic link is not followed."""
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
        """Return where data may be: outside of holes; on a device, outside of zeros."""
        with local_errors(self.path):
            found = Spans(self._holes_left_out() if self._is_file else self._zeros_left_out())
        self.require_unchanged()  # the rest of a truncated file looks like a hole
        return found

    def _holes_left_out(self) -> Iterator[Range]:
        position = 0
        while position < self.size:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # a hole up to the end
                    return
                if exc.errno != errno.EINVAL:
                    raise
                yield position, self.size  # a file system without SEEK_DATA
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
            data = read_at(self.fd, start, length)
        if len(data) < length:
            raise self._shorter()
        return data

    def write(self, start: int, data: Buffer) -> None:
        """Write all of ``data``."""
        with local_errors(self.path):
            done = os.pwrite(self.fd, data, start)
            while done < len(data):
                done += os.pwrite(self.fd, memoryview(data)[done:], start + done)

    def zero(self, start: int, stop: int) -> None:
        """Make a hole, or write zeros where the file system has no holes."""
        with local_errors(self.path):
            if punch_hole(self.fd, start, stop):
                return
            for offset in range(start, stop, MIB):
                self.write(offset, _ZERO_MIB[: min(MIB, stop - offset)])

    def sync(self, within: float = math.inf) -> None:
        """Bring the data to stable storage."""
        with self._loss.noticed(), local_errors(self.path):
            os.fdatasync(self.fd)

    def forget_cached(self) -> None:
        """Ask the kernel to drop its cached pages of the file."""
        with local_errors(self.path):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def require_unchanged(self) -> None:
        """Require the file not to have become shorter.

        Raises:
            LocalFailure: it has.
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
