# SPDX-License-Identifier: Apache-2.0
"""Where a file has data: lseek(2) with SEEK_DATA and SEEK_HOLE, as extents.

    lseek(SEEK_DATA)   the next byte that need not be zero; ENXIO: there is none before the end
    lseek(SEEK_HOLE)   the next hole, or the end

What a file system calls a hole reads as zeros, allocated or not. One that knows no holes calls
everything data, and so do we where it refuses to answer (block devices, some of FUSE's). What it
calls data only since it was read is a hole again here (``unwritten``): two looks at a file that
nobody writes to must find the same.
"""

import errno
import os
import time
from collections.abc import Callable, Generator

from imageserver.backends.file.unwritten import Unwritten
from imageserver.core.extents import STATE_HOLE, Extent, Merger, Piece

#: Extents in a list: few enough that a client that has gone is noticed soon.
_MOST = 1024
#: How long a list is gathered: of a cold cache each lseek(2) may read from the disk.
_SECONDS = 0.5
_NO_ANSWER = frozenset((errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS))


def list_extents(
    fd: int, start: int, stop: int, *, dirty: bool, check: Callable[[], None]
) -> Generator[list[Extent]]:
    """Yield the extents of [start, stop), merged, in lists; each has ``dirty`` as its last member.

    ``check`` is called where no more data is found, for the file may have become shorter, and
    raises something if it has.

    Raises:
        OSError: lseek(2) or ioctl(2) failed.
    """
    merger = Merger(start)
    pieces: list[Piece] = []
    began = time.monotonic()
    for size, state in _pieces(fd, start, stop, check):
        pieces.append((size, state, int(dirty)))
        if len(pieces) >= _MOST or time.monotonic() - began > _SECONDS:
            yield list(merger.add(pieces))
            pieces, began = [], time.monotonic()
    yield [*merger.add(pieces), *merger.finish()]


def _pieces(
    fd: int, start: int, stop: int, check: Callable[[], None]
) -> Generator[tuple[int, int]]:
    at, unwritten = start, Unwritten(fd, stop)
    while at < stop:
        data = _next_data(fd, at, stop)
        if data >= stop:
            check()
        yield min(data, stop) - at, STATE_HOLE
        if data >= stop:
            return
        at = min(_next_hole(fd, data, stop), stop)
        for length, is_zero in unwritten.cut(data, at):
            yield length, STATE_HOLE if is_zero else 0


def _next_data(fd: int, at: int, stop: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as exc:
        if exc.errno == errno.ENXIO:
            return stop
        if exc.errno in _NO_ANSWER:
            return at
        raise


def _next_hole(fd: int, at: int, stop: int) -> int:
    try:
        return os.lseek(fd, at, os.SEEK_HOLE)
    except OSError as exc:
        if exc.errno in _NO_ANSWER:
            return stop
        if exc.errno == errno.ENXIO:  # it has become shorter than that meanwhile
            return at
        raise
