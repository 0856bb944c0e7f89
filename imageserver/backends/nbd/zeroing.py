# SPDX-License-Identifier: Apache-2.0
"""Zeroing: NBD_CMD_WRITE_ZEROES in the largest steps a server takes well.

A server that can punch holes zeroes 2 GiB in no time; one that has to write the zeros itself
takes seconds for them, and must not run into the back-end timeout. NBD_CMD_FLAG_FAST_ZERO
asks which it is: such a request is quick, or refused at once. Where that is not offered,
steps start small, grow while they are quick and shrink while they are not.

What a preallocated image zeroes is to stay allocated: NBD_CMD_FLAG_NO_HOLE says so.
"""

import time
from collections import deque
from collections.abc import Iterator

from imageserver.backends.nbd.failures import NotSupported
from imageserver.backends.nbd.link import Link
from imageserver.backends.nbd.transfer import write
from imageserver.core.sources import HasFileno

#: Lengths are 32 bits on the wire; a large power of two keeps requests aligned for any format.
_MAX_STEP = 1 << 31
#: A server that writes 64 MiB of zeros a second is done with this step in a second.
_SLOW_STEP = 64 << 20
_QUICK_SECONDS = 0.25
#: One that is slower gets smaller steps: those in flight are waited for when the client has gone.
_LONG_SECONDS = 1.0
_LEAST_STEP = 1 << 20


def zero(link: Link, start: int, length: int, *, hole: bool = True) -> Iterator[int]:
    """Zero a range of any length: see ``ports.Backend``. ``hole``: it need not stay allocated."""
    stop = start + length
    first, last = -(-start // link.align) * link.align, stop // link.align * link.align
    if not link.info.can_zero or first >= last:
        yield from write(link, start, length, _Zeros())
        return
    _write_edge(link, start, first)
    for at in _zero_blocks(link, first, last, hole=hole):
        yield at - start
    _write_edge(link, last, stop)
    yield length


def _write_edge(link: Link, start: int, stop: int) -> None:
    if start < stop:
        for _ in write(link, start, stop - start, _Zeros()):
            pass


def _zero_blocks(link: Link, start: int, stop: int, *, hole: bool) -> Iterator[int]:
    """Zero whole blocks; yield up to where."""
    at = start
    if link.can_fast_zero():
        try:
            for at in _steps(link, start, stop, _MAX_STEP, fast=True, hole=hole):
                yield at
        except NotSupported:
            pass  # the server would have to write: in slower steps, from where it stopped
        else:
            return
    yield from _steps(link, at, stop, _SLOW_STEP, fast=False, hole=hole)


def _steps(  # noqa: PLR0913 - a span, a step, and how
    link: Link, start: int, stop: int, step: int, *, fast: bool, hole: bool
) -> Iterator[int]:
    pending: deque[tuple[int, int, float]] = deque()
    at = start
    try:
        while at < stop or pending:
            while at < stop and len(pending) < link.depth:
                end = min(stop, (at // step + 1) * step)
                cookie = link.zero(at, end - at, fast=fast, hole=hole)
                pending.append((cookie, end, time.monotonic()))
                at = end
            cookie, end, began = pending.popleft()
            link.wait(cookie)
            yield end
            took = time.monotonic() - began
            if took < _QUICK_SECONDS:
                step = min(step * 2, _MAX_STEP)
            elif took > _LONG_SECONDS:
                step = max(step // 2, _LEAST_STEP)
        link.settled = True
    finally:
        link.settle()


class _Zeros:
    """A source that never ends."""

    def readinto(self, buffer: memoryview, _until: HasFileno | None = None) -> int:
        """Fill all of ``buffer``."""
        buffer[:] = bytes(len(buffer))
        return len(buffer)
