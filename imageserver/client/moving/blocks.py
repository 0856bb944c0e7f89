# SPDX-License-Identifier: Apache-2.0
"""The parts of a checksum, computed on this side by several threads.

    caller's thread   cuts spans of data into blocks, takes their parts in order
    threads           read and hash one block each

A bounded number of blocks is under way, so memory does not depend on the image.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import ClientError
from imageserver.client.http.remote import Remote
from imageserver.client.plan import MIB, Range, Spans
from imageserver.core.checksums import Block, Recipe
from imageserver.core.extents import Extent

#: Entries, blocks of data or runs of zero blocks, that are under way for each thread.
_AHEAD = 4

#: Returns what a block adds to a checksum; called by any thread.
Part = Callable[[Block], bytes]


def cores() -> int:
    """Return how many threads can hash at once."""
    return len(os.sched_getaffinity(0))


def local_part(read: Callable[[int, int], bytes], recipe: Recipe) -> Part:
    """Return what hashes blocks of a local image, of which ``read`` returns bytes."""

    def pieces(start: int, length: int) -> Generator[memoryview]:
        for offset in range(start, start + length, MIB):
            yield memoryview(read(offset, min(MIB, start + length - offset)))

    return lambda block: recipe.part(block, pieces)


class RemoteParts:
    """Reads blocks of an image on a server, and tries again what fails."""

    def __init__(self, remote: Remote, recipe: Recipe, budget: RetryBudget) -> None:
        self._remote, self._recipe, self._budget = remote, recipe, budget
        self._is_over = threading.Event()

    def part(self, block: Block) -> bytes:
        """Return what a block adds."""
        return retried(lambda: self._tried(block), self._budget, wait=self._is_over.wait)

    def _tried(self, block: Block) -> bytes:
        if self._is_over.is_set():
            raise ClientError("given up")  # read by nobody
        return self._recipe.part(block, self._read)

    def _read(self, start: int, length: int) -> Generator[memoryview]:
        for data in self._remote.read(start, start + length):
            yield memoryview(data)
            self._budget.moved(len(data))

    def end(self) -> None:
        """Have threads that still read end soon."""
        self._is_over.set()
        self._remote.cut()


def parts(
    recipe: Recipe, data: Spans, span: Range, part: Part, threads: int
) -> Generator[tuple[Block, bytes | None]]:
    """Yield the blocks of a span in order, each with its part; None: it is zero."""
    pending: deque[tuple[Block, Future[bytes] | None]] = deque()
    pool = ThreadPoolExecutor(threads, "hash")
    try:
        for block in blocks(recipe, data, span):
            pending.append((block, pool.submit(part, block) if block.data else None))
            if len(pending) >= _AHEAD * threads:
                yield _taken(pending)
        while pending:
            yield _taken(pending)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _taken(pending: deque[tuple[Block, Future[bytes] | None]]) -> tuple[Block, bytes | None]:
    block, future = pending.popleft()
    return block, None if future is None else future.result()


def blocks(recipe: Recipe, data: Spans, span: Range) -> Iterator[Block]:
    """Yield the blocks of a span in order, those of holes in runs."""
    splitter = recipe.splitter(span[0])
    yield from splitter.add(_extents(data, *span))
    yield from splitter.finish()


def _extents(data: Spans, start: int, stop: int) -> Iterator[Extent]:
    """Yield extents that cover a range: data and zeros."""
    for first, last in data.within(start, stop):
        if start < first:
            yield start, first - start, True, False
        yield first, last - first, False, False
        start = last
    if start < stop:
        yield start, stop - start, True, False


def add(recipe: Recipe, found: tuple[Block, bytes | None]) -> None:
    """Add a block to its checksum."""
    block, part = found
    if part is None:
        recipe.add_zeros(block.length)
    else:
        recipe.add(part)
