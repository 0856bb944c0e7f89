# SPDX-License-Identifier: Apache-2.0
"""From extents to what is moved: spans of data, cut and joined into pieces of one request each.

    image    |DDDD....DD..DDDDDDDDDDDDDDDDDDDDD......................DD|
    spans     DDDD    DD  DDDDDDDDDDDDDDDDDDDDD                      DD
    pieces   |-------------------||-----------|                     |--|
    covers   |-------------------||-----------||-----------------------|

A request costs as much time as some hundred KiB, so a small gap is read and thrown away. A large
span is cut, so that several connections share it. What a piece *covers* begins where the piece
before it ends: finished pieces then join to a few ranges, however many there were.

Images have millions of extents: spans are two arrays of integers, pieces are made one at a time.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from imageserver.core.extents import Extent

KIB, MIB, GIB = 2**10, 2**20, 2**30
#: Longest gap that is read and thrown away, in bytes: takes about as long as a request.
MAX_GAP = 256 * KIB
#: Largest and smallest piece where several connections share the work, in bytes.
_LARGEST_SHARED, _SMALLEST_SHARED = 128 * MIB, 8 * MIB
#: Smallest piece where a request costs more than most, in bytes.
_SMALLEST_LONG = 64 * MIB
#: Largest piece of a single connection, in bytes.
_LARGEST_ALONE = GIB

#: Half-open bytes of an image.
Range = tuple[int, int]


class Spans:
    """Ordered, disjoint, half-open ranges; adjacent ones are joined."""

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts = array("q")
        self._stops = array("q")
        #: Bytes in all spans.
        self.total = 0
        for start, stop in ranges:
            self.add(start, stop)

    def add(self, start: int, stop: int) -> None:
        """Append a range that begins no earlier than the last one ends; empty ones are ignored."""
        if start >= stop:
            return
        if self._stops and self._stops[-1] == start:
            self._stops[-1] = stop
        else:
            self._starts.append(start)
            self._stops.append(stop)
        self.total += stop - start

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Range]:
        return zip(self._starts, self._stops, strict=True)

    def within(self, start: int, stop: int) -> Iterator[Range]:
        """Yield the parts of the spans that lie in a range."""
        for index in range(bisect_right(self._stops, start), len(self._stops)):
            if self._starts[index] >= stop:
                return
            yield max(self._starts[index], start), min(self._stops[index], stop)

    def raw(self) -> bytes:
        """Return the ranges as bytes, for a hash."""
        return self._starts.tobytes() + self._stops.tobytes()

    def without(self, done: Iterable[Range]) -> "Spans":
        """Return these spans minus some ordered ranges."""
        left = Spans()
        ranges = iter(done)
        gone = next(ranges, None)
        for begin, stop in self:
            start = begin
            while gone is not None and gone[0] < stop:
                left.add(start, gone[0])
                start = max(start, gone[1])
                if gone[1] > stop:
                    break
                gone = next(ranges, None)
            left.add(start, stop)
        return left

    def widened(self, block: int, size: int) -> "Spans":
        """Return spans that begin and end at multiples of ``block``, or at ``size``."""
        wide = Spans()
        last = 0
        for start, stop in self:
            end = min(-(-stop // block) * block, size)
            wide.add(max(start // block * block, last), end)
            last = end
        return wide

    def gaps(self, size: int) -> "Spans":
        """Return the gaps between these spans in ``size`` bytes."""
        return Spans([(0, size)]).without(self)


@dataclass(slots=True)
class Piece:
    """One request's bytes; ``spans`` of them are wanted, those before ``position`` are done."""

    cover: int
    start: int
    stop: int
    spans: list[Range] = field(default_factory=list)
    position: int = -1

    def __post_init__(self) -> None:
        if self.position < 0:
            self.position = self.start

    @property
    def done(self) -> Range:
        """The covered range that need not be moved again."""
        return self.cover, self.position if self.position > self.start else self.cover

    def wanted(self, start: int, stop: int) -> Iterator[Range]:
        """Yield the wanted parts of a range in this piece."""
        for index in range(bisect_right(self.spans, start, key=_stop_of), len(self.spans)):
            first, last = self.spans[index]
            if first >= stop:
                return
            yield max(first, start), min(last, stop)


def _stop_of(span: Range) -> int:
    return span[1]


def data_spans(extents: Iterable[Extent], *, dirty: bool = False) -> tuple[Spans, Spans, int]:
    """Return the spans of data and of zeros, and where the last extent ends.

    ``dirty``: only the spans that have changed.
    """
    data, zeros, end = Spans(), Spans(), 0
    for start, length, is_zero, is_dirty in extents:
        end = start + length
        if is_dirty or not dirty:
            (zeros if is_zero else data).add(start, end)
    return data, zeros, end


def piece_bytes(total: int, connections: int) -> int:
    """Return how large pieces should be for so many connections: a multiple of 1 MiB."""
    if connections == 1:
        return _LARGEST_ALONE
    share = total // (connections * 4) // MIB * MIB
    return max(_SMALLEST_SHARED, min(share, _LARGEST_SHARED))


def long_piece_bytes(total: int, connections: int) -> int:
    """Return the same where each request costs a walk over the extents: two for each connection."""
    return max(_SMALLEST_LONG, -(-total // (2 * connections * MIB)) * MIB)


def pieces(spans: Iterable[Range], largest: int, max_gap: int = MAX_GAP) -> Iterator[Piece]:
    """Cut and join spans into pieces of at most ``largest`` bytes, in order."""
    piece: Piece | None = None
    cover = 0
    for first, last in spans:
        start = first
        while start < last:
            if piece and (start - piece.stop > max_gap or start >= piece.start + largest):
                yield piece
                cover = piece.stop
                piece = None
            piece = piece or Piece(cover, start, start)
            stop = min(last, piece.start + largest)
            piece.spans.append((start, stop))
            piece.stop = start = stop
    if piece:
        yield piece


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges and join those that touch or overlap."""
    done: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if done and start <= done[-1][1]:
            done[-1] = done[-1][0], max(done[-1][1], stop)
        else:
            done.append((start, stop))
    return done
