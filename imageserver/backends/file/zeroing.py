# SPDX-License-Identifier: Apache-2.0
"""Zeroing ranges of files and block devices: fallocate(2), and writing zeros where there is none.

    FALLOC_FL_PUNCH_HOLE   gives the blocks back; a device unmaps them only where it promises that
                           they read as zeros then, otherwise it refuses
    FALLOC_FL_ZERO_RANGE   keeps them, as zeros; a device that cannot is sent zeros by the kernel

BLKDISCARD promises nothing of what is read afterwards, and is not used. All steps have
FALLOC_FL_KEEP_SIZE: no file grows.

Some file systems (tmpfs) change a file's times when a hole has been punched, and its bytes before.
An ``ETag`` is made of these times, so each step begins by changing them.
"""

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Iterator

#: fallocate(2), <linux/falloc.h>.
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
#: The system, the file system or the device cannot; EPERM: a container's filter forbids the call.
_CANNOT = frozenset(
    (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.ENOTTY, errno.EPERM)
)
#: What a device zeroes must be whole blocks; none has larger ones than a page (blkdev_fallocate).
_DEVICE_BLOCK = 4096
#: The first step, which a device that is sent zeros at 64 MiB/s is done with in a second.
_FIRST_STEP = 64 << 20
_LEAST_STEP, _MOST_STEP = 1 << 20, 1 << 40
#: Steps that take less than this are doubled ...
_QUICK_SECONDS = 0.25
#: ... and halved if they take longer than this: the client and the deadline are looked at between.
_LONG_SECONDS = 1.0
#: Zeros that are written at once.
_BLANK = 256 * 1024


class _Cannot(Exception):
    """This way of zeroing is not to be had."""


def zero(  # noqa: PLR0913 - a span, and how
    fd: int,
    start: int,
    stop: int,
    write: Callable[[memoryview, int], None],
    *,
    is_device: bool,
    keeps: bool,
) -> Iterator[int]:
    """Zero [start, stop); yield up to where. ``keeps``: it stays allocated.

    ``write`` writes all of a piece at an offset.

    Raises:
        OSError: fallocate(2) failed otherwise than by being unknown here; or what ``write`` raises.
    """
    block = _DEVICE_BLOCK if is_device else 1
    first, last = -(-start // block) * block, stop // block * block
    if first >= last:
        yield from _write(start, stop, write)
        return
    yield from _write(start, first, write)
    at = first
    for mode in (_ZERO_RANGE,) if keeps else (_PUNCH_HOLE, _ZERO_RANGE):
        try:
            for done in _steps(fd, at, last, mode, touches=not is_device):
                at = done
                yield at
            break
        except _Cannot:
            continue
    yield from _write(at, stop, write)


def _steps(fd: int, start: int, stop: int, mode: int, *, touches: bool) -> Iterator[int]:
    at, step = start, _FIRST_STEP
    while at < stop:
        end = min(stop, at + step)
        began = time.monotonic()
        if touches:
            # Whoever may write may do so, unless a filter forbids the call or FUSE lacks it.
            with contextlib.suppress(OSError):
                os.utime(fd)
        _fallocate(fd, mode | _KEEP_SIZE, at, end - at)
        took = time.monotonic() - began
        at = end
        yield at
        if took < _QUICK_SECONDS:
            step = min(step * 2, _MOST_STEP)
        elif took > _LONG_SECONDS:
            step = max(step // 2, _LEAST_STEP)


def _write(start: int, stop: int, write: Callable[[memoryview, int], None]) -> Iterator[int]:
    if start < stop:
        blank = memoryview(bytes(min(_BLANK, stop - start)))
        for at in range(start, stop, len(blank)):
            end = min(stop, at + len(blank))
            write(blank[: end - at], at)
            yield end


def _fallocate(fd: int, mode: int, start: int, length: int) -> None:
    """Call fallocate(2), which Python lacks; a signal's handler runs in between."""
    import ctypes  # noqa: PLC0415 - takes time, and many servers do without

    call = _libc_fallocate()
    while call(fd, mode, ctypes.c_int64(start), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        if number in _CANNOT:
            raise _Cannot
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


@functools.cache
def _libc_fallocate() -> "Callable[..., int]":
    """Return fallocate(2) with 64-bit offsets; musl has these under no other name."""
    import ctypes  # noqa: PLC0415 - as in _fallocate

    libc = ctypes.CDLL(None, use_errno=True)
    call: Callable[..., int] = getattr(libc, "fallocate64", None) or libc.fallocate
    return call
