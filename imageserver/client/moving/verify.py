# SPDX-License-Identifier: Apache-2.0
"""Whether both sides hold the same bytes: by hashes taken while they moved, or by reading again.

Where reading everything would take too long, samples are compared. They tell another image, but
maybe not a few changed bytes.
"""

import hashlib
import random
from collections.abc import Callable, Iterable

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import Different
from imageserver.client.http.remote import Remote
from imageserver.client.local.files import Buffer
from imageserver.client.local.formats import LocalImage
from imageserver.client.local.raw import nonzero
from imageserver.client.plan import KIB, MIB, Piece, Range, Spans, joined, pieces

_SAMPLES, _SAMPLE_BYTES = 16, 64 * KIB


class Digests:
    """A hash for each piece; the thread that moves the piece feeds it in order."""

    def __init__(self) -> None:
        self._running: dict[int, "hashlib._Hash"] = {}  # noqa: UP037 - a stub's name
        self._digests: dict[int, bytes] = {}

    def feed(self, piece: Piece, data: Buffer) -> None:
        """Add bytes of a piece."""
        running = self._running.get(piece.start)
        if running is None:
            running = self._running[piece.start] = hashlib.sha256()
        running.update(data)

    def finish(self, piece: Piece) -> None:
        """End a piece: keep its digest only."""
        self._digests[piece.start] = self._running.pop(piece.start).digest()

    def check(
        self, local: LocalImage, pieces: Iterable[Piece], told: Callable[[int], None]
    ) -> None:
        """Read pieces of the local image and compare their hashes.

        Raises:
            Different: a piece is not what came.
        """
        for piece in pieces:
            running = hashlib.sha256()
            for start, stop in piece.spans:
                for offset in range(start, stop, MIB):
                    data = local.read(offset, min(MIB, stop - offset))
                    running.update(data)
                    told(len(data))
            if running.digest() != self._digests[piece.start]:
                raise Different(
                    f"what was written between {piece.start} and {piece.stop} reads back different"
                )


def compare(
    remote: Remote,
    read: Callable[[int, int], bytes],
    todo: Iterable[Piece],
    budget: RetryBudget,
    told: Callable[[int], None],
) -> None:
    """Read pieces of the image on the server and compare them with what ``read`` returns.

    Raises:
        Different: at the first MiB that differs.
    """
    for piece in todo:

        def some(piece: Piece = piece) -> None:
            for data in remote.read(piece.position, piece.stop):
                position, stop = piece.position, piece.position + len(data)
                if data != read(position, len(data)):
                    raise Different(f"bytes {position}-{stop - 1} differ")
                told(sum(last - first for first, last in piece.wanted(position, stop)))
                piece.position = stop
                budget.moved(stop - position)

        retried(some, budget)


def compare_samples(
    remote: Remote, read: Callable[[int, int], bytes], data: Spans, budget: RetryBudget
) -> None:
    """Compare the first and last MiB of ``data``, and blocks anywhere in it.

    Raises:
        Different: at the first that differs.
    """
    compare(remote, read, pieces(samples(data), MIB, 0), budget, lambda _count: None)


def samples(data: Spans, chance: Callable[[int], int] = random.randrange) -> list[Range]:
    """Choose ranges of ``data`` to compare; ``chance(n)`` returns a random number below n."""
    if not data.total:
        return []
    ends = [(0, MIB), (data.total - MIB, data.total)]
    blocks = [chance(data.total) // _SAMPLE_BYTES * _SAMPLE_BYTES for _ in range(_SAMPLES)]
    wanted = joined(
        (max(0, start), min(stop, data.total))
        for start, stop in [*ends, *((block, block + _SAMPLE_BYTES) for block in blocks)]
    )
    found, before = [], 0  # bytes of data before the span
    for first, last in data:
        stop_before = before + last - first
        found += [
            (first + max(start, before) - before, first + min(stop, stop_before) - before)
            for start, stop in wanted
            if start < stop_before and stop > before
        ]
        before = stop_before
    return found


def check_zeros(local: LocalImage, data: Spans, zeros: Spans | None) -> None:
    """Read what must be zeros: ``zeros``, or all but ``data``; known holes are not read.

    Raises:
        Different: it is not.
    """
    found = local.spans()
    wanted = found.without(data) if zeros is None else zeros.without(found.gaps(local.size))
    for start, stop in wanted:
        for offset in range(start, stop, MIB):
            end = min(offset + MIB, stop)
            if any(nonzero(local.read(offset, end - offset))):
                raise Different(f"what should be zero between {offset} and {end} is not")


def same_length(before: int, now: int) -> None:
    """Require an image's size to be what it was.

    Raises:
        Different: it is not.
    """
    if before != now:
        raise Different(f"the image had {before} bytes, now it has {now}")
