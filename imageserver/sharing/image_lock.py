# SPDX-License-Identifier: Apache-2.0
"""QEMU's lock of an image file, held for a file that is served without QEMU.

QEMU's programs lock single bytes of a file, all of them shared (block/file-posix.c):

    100 + permission    I use it                       checked by who forbids it
    200 + permission    nobody else may use it         checked by who uses it

So a guest that is started meanwhile is refused its disk, and a disk in use is refused here.
"""

import errno
import fcntl
import os
import struct

#: Permissions of QEMU's block layer, by the number of their bit.
_READ, _WRITE, _RESIZE = 0, 1, 3
_USED, _FORBIDDEN = 100, 200
#: struct flock (fcntl(2)); 0 is the pid, which locks of open files must not have.
_FLOCK = "hhqqi4x"
#: Of a file system without locks: QEMU does without, too.
_NO_LOCKS = frozenset((errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS))


def hold(fd: int, *, writable: bool) -> bool:
    """Lock an open file for as long as it is open; return False if another program excludes that.

    Reading, too, excludes who writes or resizes: a copy would be part old, part new.
    """
    uses = (_READ, _WRITE) if writable else (_READ,)
    forbids = (_WRITE, _RESIZE)
    try:
        for byte in (*(_USED + each for each in uses), *(_FORBIDDEN + each for each in forbids)):
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        others = (*(_FORBIDDEN + each for each in uses), *(_USED + each for each in forbids))
        return all(_is_free(fd, byte) for byte in others)
    except OSError as exc:
        if exc.errno in _NO_LOCKS:
            return True
        if exc.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise


def _is_free(fd: int, byte: int) -> bool:
    """Tell whether no other open file has a byte locked."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    return bool(struct.unpack(_FLOCK, found)[0] == fcntl.F_UNLCK)


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
