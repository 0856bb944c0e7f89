# SPDX-License-Identifier: Apache-2.0
"""Blocks of a file that are allocated and were never written: FS_IOC_FIEMAP (fiemap.h).

They read as zeros, but lseek(2) calls them data for as long as a page of them is in the cache, so
that any reader, and the kernel that reads ahead for it, changes what a later look finds.

What the cache holds that is not yet on the disk is not in the map: only a map that was made after
it was written (FIEMAP_FLAG_SYNC) says that something is zero. That is waited for only where a file
has such blocks.
"""

import errno
import fcntl
import struct
from collections import deque
from collections.abc import Iterator

#: _IOWR('f', 11, struct fiemap), on the architectures of asm-generic/ioctl.h.
_FIEMAP = 0xC020660B
#: Start, length, flags, how many were mapped, room for how many, reserved.
_HEAD = struct.Struct("=QQIIII")
#: Logical, physical, length, reserved, flags, reserved.
_EXTENT = struct.Struct("=QQQ16xI12x")
_SYNC = 0x1
_UNWRITTEN = 0x800
#: Extents in one answer. The call may wait for a disk: with a longer buffer, fcntl.ioctl would keep
#: the interpreter's lock meanwhile, and no other thread could run.
_MOST = (1024 - _HEAD.size) // _EXTENT.size
#: The file system has no map, the device is none, or a filter forbids the call.
_CANNOT = frozenset(
    (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EBADR)
)


class Unwritten:
    """Tells which parts of a file were never written; asked from front to back."""

    def __init__(self, fd: int, stop: int) -> None:
        """``stop``: nothing behind it will be asked about."""
        self._fd, self._stop = fd, stop
        self._can_tell = True
        self._flags = 0
        #: Up to where the file has been looked at, and what was found that is not yet behind.
        self._known = 0
        self._found: deque[tuple[int, int]] = deque()

    def cut(self, start: int, stop: int) -> Iterator[tuple[int, bool]]:
        """Cut [start, stop): yield the length of each part, and whether it was never written.

        Raises:
            OSError: ioctl(2) failed, perhaps to write what the cache held.
        """
        at = start
        while at < stop:
            if at >= self._known:
                self._look(at)
            while self._found and self._found[0][1] <= at:
                self._found.popleft()
            first, last = self._found[0] if self._found else (self._known, self._known)
            is_unwritten = first <= at
            end = min(stop, last if is_unwritten else first)
            yield end - at, is_unwritten
            at = end

    def _look(self, start: int) -> None:
        """Look at what comes from ``start``, as far as one answer goes."""
        found: list[tuple[int, int, bool]] = []
        if self._can_tell:
            found = self._map(start)
        if not self._flags and any(unwritten for _, _, unwritten in found):
            self._flags = _SYNC
            found = self._map(start)
        whole = len(found) < _MOST
        self._known = self._stop if whole else min(self._stop, max(found[-1][1], start + 1))
        self._found = deque((first, last) for first, last, unwritten in found if unwritten)

    def _map(self, start: int) -> list[tuple[int, int, bool]]:
        answer = bytearray(_HEAD.size + _MOST * _EXTENT.size)
        _HEAD.pack_into(answer, 0, start, self._stop - start, self._flags, 0, _MOST, 0)
        try:
            fcntl.ioctl(self._fd, _FIEMAP, answer)
        except OSError as exc:
            if exc.errno not in _CANNOT:
                raise
            self._can_tell = False
            return []
        count = _HEAD.unpack_from(answer)[3]
        extents = _EXTENT.iter_unpack(answer[_HEAD.size : _HEAD.size + count * _EXTENT.size])
        return [(at, at + length, bool(flags & _UNWRITTEN)) for at, _, length, flags in extents]
