# SPDX-License-Identifier: Apache-2.0
"""Reading and writing an export through a ring of buffers.

Requests lie on multiples of the chunk size, within what the server takes. Where its minimum
block size is larger than a byte, a read is widened and cut, and a write's edges are read
first. The image's lock makes that safe; where writers share it, such edges never come here
(``images/operations.py``).

A long transfer has a thread for the NBD side (``ring``), so that receiving from one socket
and sending to the other overlap: on 2 cores that is about twice what one thread moves in
turns. A short one fits into the ring at once and is done on the spot; there a thread costs
more than it saves. What one buffer holds needs no ring: it is cut into smaller requests, so that
one part is sent while the server works for the next. Where other requests of the process are under
way, they have the cores meanwhile: less is cut, and fewer threads are started.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from queue import Empty, SimpleQueue

from imageserver.backends.nbd.link import Link
from imageserver.backends.ring import Ring, Side, fill, leave_buffer, take_buffer
from imageserver.core.errors import ShortBody
from imageserver.core.sources import Source

#: Bytes per request of a transfer that one buffer holds, at least: a part is sent to the client
#: while the NBD server works for the next.
_STEP = 256 * 1024
#: ... which is a multiple of this, and of a block.
_UNIT = 64 * 1024
#: A read up to this size has no thread of its own beside other requests, in bytes.
_THREADED = 8 << 20


@dataclass(slots=True)
class _Piece:
    """One request's place in the image: bytes [start, stop), of which [low, high) are wanted."""

    start: int
    stop: int
    low: int
    high: int
    buffer: bytearray = field(default_factory=bytearray)
    at: int = 0
    """Where the request's part of the buffer begins."""
    cookie: int = 0

    def whole(self) -> memoryview:
        """Return the buffer as far as the request reaches."""
        return memoryview(self.buffer)[self.at : self.at + self.stop - self.start]

    def wanted(self) -> memoryview:
        """Return the part that the client reads or writes."""
        begin = self.at - self.start
        return memoryview(self.buffer)[begin + self.low : begin + self.high]

    def surround(self, edges: dict[int, bytes]) -> None:
        """Put around the wanted part what blocks, by their offset in the image, have there.

        Only once the wanted part has come: the source says when a buffer may be written to.
        """
        begin = self.at - self.start
        for offset, block in edges.items():
            for start, stop in ((self.start, self.low), (self.high, self.stop)):
                first, last = max(start, offset), min(stop, offset + len(block))
                if first < last:
                    part = block[first - offset : last - offset]
                    self.buffer[begin + first : begin + last] = part


def _cut(link: Link, start: int, stop: int, step: int = 0, origin: int = 0) -> Iterator[_Piece]:
    """Cut [start, stop) at ``origin`` and each ``step`` from it, each piece widened to blocks.

    By default: at multiples of the chunk size.
    """
    low, step = start, step or link.chunk
    while low < stop:
        high = min(stop, low + step - (low - origin) % step)
        first = low // link.align * link.align
        last = min(-(-high // link.align) * link.align, link.size)
        yield _Piece(first, last, low, high)
        low = high


def _ring(link: Link, length: int) -> Ring:
    """Return as many buffers as ``length`` bytes can keep in flight."""
    return Ring(min(link.depth, 2 + length // link.chunk), link.chunk, (link.name, link.server))


def _is_short(link: Link, length: int) -> bool:
    """Tell whether the whole transfer can be in flight at once."""
    return length <= link.chunk * (link.depth - 1)


def _needs_no_thread(link: Link, length: int) -> bool:
    """Tell whether a read is done on the spot."""
    return _is_short(link, length) or (length <= _THREADED and not link.is_alone)


@contextmanager
def _stopping(link: Link, wake: Callable[[], None]) -> Iterator[None]:
    """Make the thread at the link give up, wherever it waits."""
    with link.stopped():
        wake()
        yield


def _fits(link: Link, start: int, length: int) -> bool:
    """Tell whether one buffer holds the transfer, and the rest of the blocks at its edges."""
    blocks = -(-(start + length) // link.align) - start // link.align
    return length > 0 and blocks * link.align <= link.chunk


def _parts(link: Link, start: int, length: int, buffer: bytearray) -> list[_Piece]:
    """Cut what one buffer holds into requests, each with its part of the buffer.

    They are as many as may be in flight, but none is small; one, beside other requests.
    """
    unit = max(_UNIT // link.align, 1) * link.align
    least = max(_STEP, -(-link.chunk // link.depth)) if link.is_alone else link.chunk
    first = start // link.align * link.align
    pieces = list(_cut(link, start, start + length, -(-least // unit) * unit, first))
    for piece in pieces:
        piece.buffer, piece.at = buffer, piece.start - first
    return pieces


def read(link: Link, start: int, length: int) -> Generator[memoryview]:
    """Yield ``length`` bytes from ``start``: see ``ports.Backend``."""
    return (_read_one if _fits(link, start, length) else _read_several)(link, start, length)


def _read_one(link: Link, start: int, length: int) -> Generator[memoryview]:
    owner = link.name, link.server
    buffer = take_buffer(link.chunk, owner)
    pieces = _parts(link, start, length, buffer)
    for piece in pieces:
        piece.cookie = link.pread(piece.whole(), piece.start)
    for piece in pieces:
        link.wait(piece.cookie)
        yield piece.wanted()
    leave_buffer(buffer, owner)


def _read_several(link: Link, start: int, length: int) -> Generator[memoryview]:
    with _ring(link, length) as ring:
        pieces = _read_pieces(link, _cut(link, start, start + length), ring)
        if not _needs_no_thread(link, length):
            pieces = _read_ahead(link, pieces, ring)
        yield from _wanted(pieces, ring)


def read_spans(link: Link, spans: Sequence[tuple[int, int]]) -> Generator[memoryview]:
    """Yield the bytes of spans, one after the other: see ``ports.Backend``."""
    cut = chain.from_iterable(_cut(link, start, stop) for start, stop in spans)
    with Ring(link.depth, link.chunk, (link.name, link.server)) as ring:
        pieces = _read_pieces(link, cut, ring)
        if len(spans) >= link.depth or not _is_short(link, sum(b - a for a, b in spans)):
            pieces = _read_ahead(link, pieces, ring)
        yield from _wanted(pieces, ring)


def _wanted(pieces: Generator[_Piece], ring: Ring) -> Generator[memoryview]:
    with closing(pieces):
        for piece in pieces:
            yield piece.wanted()
            ring.give(piece.buffer)


def _read_pieces(link: Link, pieces: Iterator[_Piece], ring: Ring) -> Generator[_Piece]:
    pending: deque[_Piece] = deque()
    piece = next(pieces, None)
    while piece or pending:
        while piece and (buffer := ring.take(wait=not pending)) is not None:
            piece.buffer = buffer
            piece.cookie = link.pread(piece.whole(), piece.start)
            pending.append(piece)
            piece = next(pieces, None)
        if not pending:
            return  # the ring was closed
        link.wait(pending[0].cookie)
        yield pending.popleft()


def _read_ahead(link: Link, pieces: Iterator[_Piece], ring: Ring) -> Generator[_Piece]:
    """Run ``pieces`` on a thread, as far ahead as there are empty buffers."""
    filled: SimpleQueue[_Piece | None] = SimpleQueue()

    def work() -> None:
        for piece in pieces:
            filled.put(piece)

    with Side(
        work, ended=lambda: filled.put(None), stopping=lambda: _stopping(link, ring.close)
    ) as side:
        while (piece := filled.get()) is not None:
            yield piece
        side.finish()


def write(link: Link, start: int, length: int, source: Source) -> Generator[int]:
    """Write ``length`` bytes from ``source``: see ``ports.Backend``."""
    write_pieces = _write_one if _fits(link, start, length) else _write_several
    try:
        yield from write_pieces(link, start, length, source)
        link.settled = True
    finally:
        link.settle()


def _write_one(link: Link, start: int, length: int, source: Source) -> Generator[int]:
    edges = _read_edges(link, start, start + length)
    owner = link.name, link.server
    buffer = take_buffer(link.chunk, owner)
    pieces = _parts(link, start, length, buffer)
    for piece in pieces:
        wanted = piece.wanted()
        filled = fill(source, wanted)
        if filled < len(wanted):
            raise ShortBody(piece.low - start + filled)
        piece.surround(edges)
        piece.cookie = link.pwrite(piece.whole(), piece.start)
    for piece in pieces:
        link.wait(piece.cookie)
        yield piece.high - start
    leave_buffer(buffer, owner)


def _write_several(link: Link, start: int, length: int, source: Source) -> Generator[int]:
    write_pieces = _write_here if _is_short(link, length) else _write_behind
    with _ring(link, length) as ring:
        pieces = _fill_pieces(link, start, length, ring, source)
        with closing(write_pieces(link, pieces, ring)) as written:
            for acknowledged in written:
                yield acknowledged - start


def _fill_pieces(
    link: Link, start: int, length: int, ring: Ring, source: Source
) -> Iterator[_Piece]:
    edges = _read_edges(link, start, start + length)
    for piece in _cut(link, start, start + length):
        buffer = ring.take(wait=True)
        if buffer is None:
            return  # the NBD side has failed
        piece.buffer = buffer
        wanted = piece.wanted()
        filled = fill(source, wanted, ring)
        if filled < len(wanted):
            if ring.is_closed:
                return  # the NBD side has failed
            raise ShortBody(piece.low - start + filled)
        piece.surround(edges)
        yield piece


def _read_edges(link: Link, start: int, stop: int) -> dict[int, bytes]:
    """Return the blocks that a write covers only in part, as the export holds them."""
    edges: dict[int, bytes] = {}
    if link.align == 1:
        return edges
    for at in (start, stop):
        block = at // link.align * link.align
        if block != at and block not in edges:
            view = memoryview(bytearray(min(link.align, link.size - block)))
            link.wait(link.pread(view, block))
            edges[block] = bytes(view)
    return edges


def _write_here(link: Link, pieces: Iterator[_Piece], ring: Ring) -> Generator[int]:
    pending = []
    for piece in pieces:
        piece.cookie = link.pwrite(piece.whole(), piece.start)
        pending.append(piece)
    for piece in pending:
        link.wait(piece.cookie)
        ring.give(piece.buffer)
        yield piece.high


def _write_behind(link: Link, pieces: Iterator[_Piece], ring: Ring) -> Generator[int]:
    """Fill pieces here and write them on a thread."""
    filled: SimpleQueue[_Piece | None] = SimpleQueue()
    acknowledged: SimpleQueue[int] = SimpleQueue()

    def work() -> None:
        pending: deque[_Piece] = deque()
        more = True
        while more or pending:
            while more:
                try:
                    piece = filled.get(block=not pending)
                except Empty:
                    break
                more = piece is not None
                if piece:
                    piece.cookie = link.pwrite(piece.whole(), piece.start)
                    pending.append(piece)
            if pending:
                link.wait(pending[0].cookie)
                piece = pending.popleft()
                acknowledged.put(piece.high)
                ring.give(piece.buffer)

    with Side(
        work, ended=ring.close, stopping=lambda: _stopping(link, lambda: filled.put(None))
    ) as side:
        for piece in pieces:
            filled.put(piece)
            while not acknowledged.empty():
                yield acknowledged.get()
        filled.put(None)
        side.finish()
        while not acknowledged.empty():
            yield acknowledged.get()
