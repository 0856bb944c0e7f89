# SPDX-License-Identifier: Apache-2.0
"""Extents: from the replies of an NBD server to a gapless, merged list over an image.

A server answers a block status request per *meta context*, with (length, flags) pairs from
the offset that was asked for (NBD protocol, "NBD_REPLY_TYPE_BLOCK_STATUS"). It may say less
than asked, or more, and each context its own amount:

    asked            |--------------------------------|
    base:allocation  |--data--|------hole------|------data---------|
    dirty-bitmap     |-clean-|---dirty---|
                             ^           ^
                 boundaries of both      both known up to here: the next request starts here

So a step takes the replies of both contexts, walks them side by side up to the nearest end
of any, and says how far it came. ``Merger`` joins equal neighbours across steps.
All linear; memory does not depend on the image.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

#: base:allocation flags: NBD_STATE_HOLE and NBD_STATE_ZERO. Either promises nothing to copy.
ALLOCATION = "base:allocation"
STATE_HOLE = 1
STATE_ZERO = 2
#: qemu:dirty-bitmap flag, bit 0 (qemu docs/interop/nbd.txt).
STATE_DIRTY = 1
#: qemu:allocation-depth: how many layers down data is allocated; 0: nowhere in the chain.
DEPTH = "qemu:allocation-depth"


def dirty_context(bitmap: str) -> str:
    """Return the meta context that qemu-nbd offers for a dirty bitmap."""
    return f"qemu:dirty-bitmap:{bitmap}"


@dataclass(frozen=True, slots=True)
class Reply:
    """One context's answer, from the offset asked for: ``lengths`` in bytes and their ``flags``."""

    lengths: Sequence[int]
    flags: Sequence[int]

    def holes(self) -> "Reply":
        """Return an answer about ``DEPTH`` as one bit: set where nothing is allocated."""
        return Reply(self.lengths, [depth == 0 for depth in self.flags])

    def after(self, skipped: int) -> "Reply":
        """Return the answer from ``skipped`` bytes on; empty where it does not reach so far."""
        for index, length in enumerate(self.lengths):
            if length > skipped:
                rest = [length - skipped, *self.lengths[index + 1 :]]
                return Reply(rest, self.flags[index:])
            skipped -= length
        return Reply((), ())


#: A piece of an image: (length in bytes, base:allocation flags, flags of the other context).
#: That other context tells what is dirty, or what is a hole, in bit 0.
#: A plain tuple: millions of them pass through.
Piece = tuple[int, int, int]


def allocation_pieces(reply: Reply, limit: int, bits: int = 0) -> Iterator[Piece]:
    """Yield one context's pieces, cut at ``limit`` bytes, with ``bits`` for the other's flags."""
    for length, flags in zip(reply.lengths, reply.flags, strict=True):
        if length >= limit:
            yield limit, flags, bits
            return
        limit -= length
        yield length, flags, bits


def union_pieces(allocation: Reply, other: Reply, limit: int) -> Iterator[Piece]:
    """Walk two contexts side by side, up to the nearest end of either or ``limit`` bytes."""
    runs = zip(other.lengths, other.flags, strict=True)
    other_left, other_flags = next(runs, (0, 0))
    for length, state in zip(allocation.lengths, allocation.flags, strict=True):
        left = min(length, limit)
        limit -= left
        while left:
            if not other_left:
                other_left, other_flags = next(runs, (0, 0))
                if not other_left:
                    return
            step = min(left, other_left)
            yield step, state, other_flags
            left -= step
            other_left -= step
        if not limit:
            return


#: An extent as clients see it: (start, length, zero, dirty or hole), as was asked for.
Extent = tuple[int, int, bool, bool]


class Merger:
    """Joins neighbouring pieces that agree into extents, over any number of calls to ``add``.

    Only what the answer shows may split them: HOLE and ZERO both mean ``zero``. The pieces of
    a call must be taken to the end before the next call.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._length = 0
        self._zero = False
        self._other = False

    def add(self, pieces: Iterable[Piece]) -> Iterator[Extent]:
        """Yield every extent that is complete; the last one stays open for the next call."""
        start, length, zero, other = self._start, self._length, self._zero, self._other
        for size, state, bits in pieces:
            if not size:
                continue
            is_zero = state & 3 != 0  # STATE_HOLE | STATE_ZERO; a literal: the hottest line here
            is_other = bits & 1 != 0  # STATE_DIRTY, or a hole
            if is_zero == zero and is_other == other:
                length += size
            else:
                if length:
                    yield start, length, zero, other
                start += length
                length, zero, other = size, is_zero, is_other
        self._start, self._length, self._zero, self._other = start, length, zero, other

    @property
    def position(self) -> int:
        """How far the image is covered, in bytes."""
        return self._start + self._length

    def finish(self) -> Iterator[Extent]:
        """Yield the last extent, if the image has any byte."""
        if self._length:
            yield self._start, self._length, self._zero, self._other
            self._start += self._length
            self._length = 0
