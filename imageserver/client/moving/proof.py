# SPDX-License-Identifier: Apache-2.0
"""Whether an image on a server is what this side has, by the server's checksums of its spans.

    this side   digest of each block: taken while it moved, or read now
    server      one checksum for each span of some GiB of data; at the same time

Where a span's differ, halves of it are compared until one block is left, which the error names.
A server without checksums of spans (oVirt's daemon) has one of the whole image, and is read where
that differs.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import Different, Transient
from imageserver.client.http.remote import Remote
from imageserver.client.moving.blocks import Part, add, blocks, cores, parts
from imageserver.client.moving.verify import compare
from imageserver.client.plan import GIB, Piece, Range, Spans
from imageserver.core.checksums import Recipe

#: Of which block hash: the digests on upload are SHA-256, too, and most processors compute it.
_ALGORITHM = "sha256"
#: Data of one request, in bytes: that much is computed again where one fails.
_SPAN_BYTES = 4 * GIB


def recipe() -> Recipe:
    """Return what computes the checksums that are compared."""
    return Recipe(_ALGORITHM, None)


class Proof:
    """Compares an image of ``size`` bytes, whose data this side has in ``data``."""

    def __init__(
        self, remote: Remote, data: Spans, size: int, budget: RetryBudget, *, has_spans: bool
    ) -> None:
        self._remote, self._data, self._size = remote, data, size
        self._budget = budget
        self._has_spans = has_spans

    def compare(
        self,
        where: Spans,
        part: Part,
        read: Callable[[int, int], bytes],
        told: Callable[[int], None],
    ) -> None:
        """Compare spans, each by blocks from its start, of which ``part`` returns the digests.

        ``read`` returns bytes, where digests are not enough to find a difference.

        Raises:
            Different: at the first block that differs.
        """
        for span in self._cut(where):
            digests: dict[int, bytes] = {}
            mine, theirs = self._both(span, part, digests, told)
            if mine == theirs:
                continue
            if self._has_spans:
                self._find(span, digests)
            whole = Piece(0, 0, self._size, [(0, self._size)])
            compare(self._remote, read, [whole], self._budget, lambda _count: None)
            raise Different("the server's checksum is that of other bytes than it serves")

    def _cut(self, where: Spans) -> Iterator[Range]:
        """Yield spans with a bounded amount of data each."""
        for span in where:
            yield from self._cut_one(*span) if self._has_spans else [span]

    def _cut_one(self, start: int, stop: int) -> Iterator[Range]:
        block, found = recipe().block_size, 0
        for first, last in self._data.within(start, stop):
            found += last - first
            while found > _SPAN_BYTES:
                found -= _SPAN_BYTES
                end = -(-(last - found) // block) * block
                if start < end < stop:
                    yield start, end
                    start = end
        yield start, stop

    def _both(
        self, span: Range, part: Part, digests: dict[int, bytes], told: Callable[[int], None]
    ) -> tuple[str, str]:
        """Return this side's checksum of a span and the server's; note each block's digest."""
        ours = recipe()
        pool = ThreadPoolExecutor(1, "checksum")
        answer = pool.submit(self._ask, span)
        try:
            found = parts(ours, self._data, span, part, cores())
            with contextlib.closing(found):
                for block, digest in found:
                    if digest is not None:
                        digests[block.start] = digest
                    add(ours, (block, digest))
                    told(sum(stop - start for start, stop in block.data))
            try:
                theirs = answer.result()
            except Transient:
                theirs = retried(lambda: self._ask(span), self._budget)
        except BaseException:
            self._remote.cut()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return _hex(ours), theirs

    def _ask(self, span: Range) -> str:
        is_whole = span == (0, self._size)
        asked = recipe()
        return self._remote.checksum(asked.algorithm, asked.block_size, None if is_whole else span)

    def _find(self, span: Range, digests: dict[int, bytes]) -> None:
        """Find the first block that differs in a span that does.

        Raises:
            Different: always.
        """
        (start, stop), size = span, recipe().block_size
        while stop - start > size:
            middle = start + (stop - start + size - 1) // size // 2 * size
            if self._is_same((start, middle), digests):
                start = middle
            else:
                stop = middle
        if self._is_same((start, stop), digests):
            raise Different(
                f"bytes {span[0]}-{span[1] - 1} differ, and no block of them alone: "
                "what the server reads is not always the same"
            )
        raise Different(f"bytes {start}-{stop - 1} differ")

    def _is_same(self, span: Range, digests: dict[int, bytes]) -> bool:
        ours = recipe()
        for block in blocks(ours, self._data, span):
            add(ours, (block, digests[block.start] if block.data else None))
        return _hex(ours) == retried(lambda: self._ask(span), self._budget)


def _hex(made: Recipe) -> str:
    return str(made.answer()["checksum"])
