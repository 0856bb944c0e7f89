# SPDX-License-Identifier: Apache-2.0
"""What the kernel is asked about its page cache: what is in there, to write it back, to drop it.

All that is advice, and fails unseen, but for one thing. sync_file_range(2) is no fsync: it writes
no metadata and asks no disk to empty its own cache. But where it waits it reports, once for each
open file, that pages could not be written (errseq in Linux's Documentation/core-api/errseq.rst),
with whatever number the disk, or the server of the file, has given: ENOMEM, ENODEV and EACCES are
among them. fsync(2) on the same descriptor is silent about it then. So no error of a wait is
ignored. That the call is missing or forbidden, or memory is short, is seen before: where writing
begins, which looks at no earlier error.
"""

import contextlib
import ctypes
import errno
import functools
import os

PAGE = os.sysconf("SC_PAGE_SIZE")
#: The call is not there, not allowed, or of no use for this file or at this moment.
_CANNOT = {
    *(errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ESPIPE, errno.ENODEV, errno.EACCES),
    *(errno.ENOMEM, errno.EOPNOTSUPP, errno.EAGAIN),
}
#: The system call's number on every architecture but alpha; no C library of Debian 12 has it.
_CACHESTAT = 451
#: sync_file_range(2).
_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4
#: mmap(2).
_PROT_NONE, _MAP_SHARED = 0, 1
_MAP_FAILED = ctypes.c_void_p(-1).value


def pages(length: int) -> int:
    """Return how many pages so many bytes take."""
    return -(-length // PAGE)


def find_cached(fd: int, start: int, length: int) -> bytes | None:
    """Return, for each page from ``start``, 1 where it is in the page cache, else 0.

    ``start`` must be a multiple of the page size. None: it cannot be told.

    cachestat(2) (Linux 6.5) takes 2 us for a window, mincore 100, but only counts. Both are for
    those who own the file or may write to it: mincore tells others, since Linux 5.2, that every
    page is there. (Reads that must not wait, RWF_NOWAIT, tell everybody, but newer kernels begin
    to read ahead for them.)
    """
    count, most = _cachestat(fd, start, length), pages(length)
    if count in {0, most}:
        return bytes(most) if count == 0 else b"\1" * most
    return _mincore(fd, start, length) if _may_ask(fd) else None


def _may_ask(fd: int) -> bool:
    try:
        owner = os.fstat(fd).st_uid
    except OSError:
        return False
    return os.geteuid() in {0, owner} or os.access(f"/proc/self/fd/{fd}", os.W_OK)


def _cachestat(fd: int, start: int, length: int) -> int | None:
    """Return how many pages are in the cache; None: it cannot be told."""
    counts = (ctypes.c_uint64 * 5)()  # struct cachestat; the first are those in the cache
    span = (ctypes.c_uint64 * 2)(start, length)
    if _libc().syscall(_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(counts), 0):
        return None
    return int(counts[0])


def _mincore(fd: int, start: int, length: int) -> bytes | None:
    libc = _libc()
    address = libc.mmap(None, length, _PROT_NONE, _MAP_SHARED, fd, start)
    if address == _MAP_FAILED:
        return None
    try:
        cached = (ctypes.c_ubyte * pages(length))()
        if libc.mincore(address, length, cached):
            return None
    finally:
        libc.munmap(address, length)
    return bytes(cached)


def drop(fd: int, start: int, stop: int) -> None:
    """Have pages leave the cache that are neither dirty nor mapped. Never fails."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_DONTNEED)


def write_back(fd: int, start: int, stop: int, *, waits: bool = False) -> bool:
    """Begin to write [start, stop) to the disk; False: that cannot be done here, or now.

    ``waits``: have it begun, and wait until all is there. Only for what has begun without.

    Raises:
        OSError: it could not be stored. A wait raises whatever the kernel says.
    """
    flags = _WAIT_BEFORE | _WRITE | _WAIT_AFTER if waits else _WRITE
    while _libc().sync_file_range(fd, start, stop - start, flags):
        number = ctypes.get_errno()
        if number in _CANNOT and not waits:
            return False
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return True


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    offset, size = ctypes.c_int64, ctypes.c_size_t
    # An offset has 64 bits where the C library has no other, as on every machine of 64 bits.
    libc.mmap.argtypes = (ctypes.c_void_p, size, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.mmap.restype = ctypes.c_void_p
    libc.munmap.argtypes = (ctypes.c_void_p, size)
    libc.mincore.argtypes = (ctypes.c_void_p, size, ctypes.c_void_p)
    libc.syscall.argtypes = (ctypes.c_long, ctypes.c_int, *(ctypes.c_void_p,) * 2, ctypes.c_uint)
    libc.syscall.restype = ctypes.c_long
    libc.sync_file_range.argtypes = (ctypes.c_int, offset, offset, ctypes.c_uint)
    return libc
