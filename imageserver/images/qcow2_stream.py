# SPDX-License-Identifier: Apache-2.0
"""An image as a qcow2 file, made while it is sent; any part of it, in constant memory.

    survey    one walk over the extents: what is allocated, so where everything lies
    stream    group by group: the group's extents once more, its L2 table, its data

The second look is compared with the first. Where they differ, somebody has changed the image
though its lock is held, and the file would be of two states: the stream ends. Bytes that are
changed in place keep their extents: where the image has an ``ETag``, ``one_state`` sees them.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from imageserver.core.errors import ImageChanged
from imageserver.core.ports import Backend
from imageserver.core.qcow2_clusters import Clusters, Run, split
from imageserver.core.qcow2_layout import Layout, Shape, Survey
from imageserver.core.ranges import Span
from imageserver.images import operations
from imageserver.images.sessions import Session

#: How much of the disk is looked at again at once, where a group has less, in bytes: small
#: clusters have small groups, and each look is a round trip or two.
_BATCH = 64 << 20
#: Gaps between data that are shorter, in bytes, are read along with it: a cluster is. Of 512 MiB in
#: clusters with one between any two, over NBD, 480 MiB/s arrive so, 260 if each is read by itself.
_GAP = 128 << 10
#: Pieces of less are put together, up to about so many bytes.
_SMALL, _ENOUGH = 64 << 10, 256 << 10
#: How soon it is noticed that the client has gone.
_CHECK_SECONDS = 0.1

#: What comes next: bytes, or a span of the image, (start, stop).
_Item = bytes | tuple[int, int]


def survey(session: Session, shape: Shape, *, overlay: bool) -> Layout:
    """Walk the extents of the whole image; ``overlay``: only what is dirty counts.

    Raises:
        BadRequest: QEMU would not open so large a file.
    """
    found = Survey(shape.group_bits)
    for runs in _runs(session, shape, 0, session.size, overlay=overlay):
        found.add(split(runs, shape.group_bits))
    return Layout(shape, found)


def stream(
    session: Session, layout: Layout, span: Span, *, overlay: bool, one_state: bool = False
) -> Generator[memoryview | bytes]:
    """Yield the bytes ``span`` of the file; each piece is valid until the next is asked for.

    ``one_state``: all are of the image's state as it was opened, which has an ETag.

    Raises:
        ImageChanged: they are not, or the extents are not those of the survey.
    """
    pieces = _pieces(session, layout, span.start, span.stop, overlay=overlay)
    return operations.sent(session, span, _gathered(pieces), one_state=one_state)


def _runs(
    session: Session, shape: Shape, start: int, stop: int, *, overlay: bool
) -> Iterator[list[Run]]:
    clusters = Clusters(shape.cluster_bits, overlay=overlay)
    check_at = time.monotonic() + _CHECK_SECONDS
    with closing(session.backend.extents(start, stop, dirty=overlay)) as listed:
        for extents in listed:
            yield clusters.add(extents)
            if time.monotonic() >= check_at:
                session.request.check()
                check_at = time.monotonic() + _CHECK_SECONDS
    yield clusters.finish()


def _pieces(
    session: Session, layout: Layout, start: int, stop: int, *, overlay: bool
) -> Generator[memoryview | bytes]:
    if start < layout.body:
        yield from layout.metadata(start, min(stop, layout.body))
        start = layout.body
    first = layout.index_at(start) if start < stop else layout.count
    while first < layout.count and layout.offset(first) < stop:
        last = _end_of_batch(layout, first, stop)
        groups = _look_again(session, layout, first, last, overlay=overlay)
        items = [
            item
            for index, runs in enumerate(groups, first)
            for item in _items(layout, index, runs, start, stop)
        ]
        yield from _filled(session.backend, items)
        first = last


def _end_of_batch(layout: Layout, first: int, stop: int) -> int:
    """Return the group after the last one to be sent together with ``first``."""
    limit = layout.number(first) + max(1, _BATCH // layout.shape.group_size)
    last = first + 1
    while last < layout.count and layout.number(last) < limit and layout.offset(last) < stop:
        last += 1
    return last


def _look_again(
    session: Session, layout: Layout, first: int, last: int, *, overlay: bool
) -> list[list[Run]]:
    """Return the runs of groups [first, last).

    Raises:
        ImageChanged: they are not those of the survey.
    """
    shape = layout.shape
    begin = layout.number(first) * shape.group_size
    end = min((layout.number(last - 1) + 1) * shape.group_size, session.size)
    again, found = Survey(shape.group_bits), []
    for joined in _runs(session, shape, begin, end, overlay=overlay):
        runs = list(split(joined, shape.group_bits))
        again.add(runs)
        found += runs
    if again.groups() != layout.groups(first, last):
        raise ImageChanged(f"bytes {begin} to {end}: the extents are not what they were")
    groups: dict[int, list[Run]] = {}
    for run in found:
        groups.setdefault(run[0] >> shape.group_bits, []).append(run)
    return list(groups.values())


def _items(layout: Layout, index: int, runs: list[Run], start: int, stop: int) -> Iterator[_Item]:
    """Yield what of one group lies in [start, stop) of the file."""
    bits, size = layout.shape.cluster_bits, layout.shape.size
    at = layout.offset(index)
    if table := layout.l2_table(index, runs)[max(0, start - at) : max(0, stop - at)]:
        yield table
    at += layout.shape.cluster_size
    for first, end, has_data in runs:
        if not has_data:
            continue
        after = at + ((end - first) << bits)
        low, high = max(at, start), min(after, stop)
        if low < high:
            begin = (first << bits) + low - at
            finish = begin + high - low
            if begin < size:
                yield begin, min(finish, size)
            if finish > size:  # the last cluster reaches beyond the image
                yield bytes(finish - max(begin, size))
        at = after


def _filled(backend: Backend, items: Sequence[_Item]) -> Generator[memoryview | bytes]:
    """Yield items as bytes, all spans read in one go."""
    with closing(_Reader(backend, [item for item in items if isinstance(item, tuple)])) as reader:
        for item in items:
            if isinstance(item, tuple):
                yield from reader.take(*item)
            else:
                yield item


class _Reader:
    """Reads spans of an image, in order; what lies in short gaps is read, too, and dropped."""

    def __init__(self, backend: Backend, spans: Sequence[tuple[int, int]]) -> None:
        self._reads = _joined(spans)
        self._pieces = backend.read_spans(self._reads)
        self._next = iter(self._reads)
        #: The piece that was read last is [at, stop) of a read up to ``end``.
        self._at = self._stop = self._end = 0
        self._view = memoryview(b"")

    def take(self, start: int, stop: int) -> Iterator[memoryview]:
        """Yield the bytes of a span: the next one, or the rest of it."""
        while start < stop:
            while self._stop <= start:
                self._advance()
            high = min(stop, self._stop)
            yield self._view[start - self._at : high - self._at]
            start = high

    def _advance(self) -> None:
        if self._stop == self._end:
            self._stop, self._end = next(self._next)
        self._view = next(self._pieces)
        self._at, self._stop = self._stop, self._stop + len(self._view)

    def close(self) -> None:
        """Stop reading."""
        self._pieces.close()


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and start - joined[-1][1] < _GAP:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return joined


def _gathered(pieces: Generator[memoryview | bytes]) -> Generator[memoryview | bytes]:
    """Put small pieces together: each costs a system call or two on its way to the client."""
    small: list[bytes] = []
    held = 0
    with closing(pieces):
        for piece in pieces:
            if len(piece) >= _SMALL:
                if small:
                    yield b"".join(small)
                    small, held = [], 0
                yield piece
                continue
            small.append(bytes(piece))
            held += len(piece)
            if held >= _ENOUGH:
                yield b"".join(small)
                small, held = [], 0
    if small:
        yield b"".join(small)
