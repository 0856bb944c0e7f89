# SPDX-License-Identifier: Apache-2.0
"""Digests of an image's blocks, taken while its bytes move.

    blocks      |            0            |            1            |
    data          DDDDDDD    DDDDDDDDDDDDD DDDDDD
    pieces       |------- first --------------->|--- second -->|

Each mover feeds the bytes of its pieces in order, and what lies between data is zero. So a block's
digest is known when its last data has come, if all of it came in order. Where two movers had parts
of a block and the later part came first, or where an earlier run has fetched some of it, there is
no digest: that block is read again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imageserver.client.local.files import Buffer
from imageserver.client.plan import MIB, Spans
from imageserver.core.checksums import Recipe

if TYPE_CHECKING:
    from hashlib import _Hash

#: Digests that are kept together: a dictionary's entry for each would take five times the memory.
_TOGETHER = 1024
_ZEROS = memoryview(bytes(MIB))


@dataclass(slots=True)
class _Running:
    """A block of which some has come: up to ``position``."""

    hash: "_Hash"
    position: int


@dataclass(slots=True)
class _Page:
    digests: bytearray
    is_there: bytearray = field(default_factory=lambda: bytearray(_TOGETHER))


class MovedBlocks:
    """What has moved of an image of ``size`` bytes whose ``data`` moves; several threads feed."""

    def __init__(self, recipe: Recipe, data: Spans, size: int) -> None:
        self._recipe, self._data, self._size = recipe, data, size
        self._block, self._length = recipe.block_size, recipe.begin().digest_size
        #: None: some came in another order.
        self._running: dict[int, _Running | None] = {}
        self._pages: dict[int, _Page] = {}

    def digest(self, start: int) -> bytes | None:
        """Return the digest of the block at ``start``, if it came in order."""
        page, index = divmod(start // self._block, _TOGETHER)
        found = self._pages.get(page)
        if found is None or not found.is_there[index]:
            return None
        return bytes(found.digests[index * self._length : (index + 1) * self._length])

    def note(self, start: int, pieces: Iterable[bytes], sha256: bytes | None) -> None:
        """Take bytes that have moved, of which the SHA-256 may be known."""
        end = min(start + self._block, self._size)
        if sha256 and self._recipe.algorithm == "sha256" and not start % self._block:
            pieces = list(pieces)
            if sum(map(len, pieces)) == end - start:
                self._keep(start // self._block, sha256)
                return
        for data in pieces:
            self.feed(start, data)
            start += len(data)

    def feed(self, start: int, data: Buffer) -> None:
        """Take bytes that have moved; those that are sent again count once."""
        view = memoryview(data)
        while view:
            count = min(len(view), self._block - start % self._block)
            self._feed(start // self._block, start, view[:count])
            start, view = start + count, view[count:]

    def _feed(self, number: int, start: int, view: memoryview) -> None:
        first = number * self._block
        running = self._running.setdefault(number, _Running(self._recipe.begin(), first))
        if running is None or self.digest(first) is not None:
            return
        end = min(first + self._block, self._size)
        if start < running.position:
            view = view[running.position - start :]
            start = running.position
            if not view:
                return
        elif start != self._next(running.position, end):
            self._running[number] = None
            return
        _zeros(running, start)
        running.hash.update(view)
        running.position = start + len(view)
        if self._next(running.position, end) == end:
            _zeros(running, end)
            self._finish(number, running)

    def _next(self, position: int, end: int) -> int:
        """Return where data goes on before ``end``."""
        return next((start for start, _ in self._data.within(position, end)), end)

    def _finish(self, number: int, running: _Running) -> None:
        if self._running[number] is not running:
            return
        self._keep(number, running.hash.digest())
        del self._running[number]

    def _keep(self, number: int, digest: bytes) -> None:
        page, index = divmod(number, _TOGETHER)
        empty = _Page(bytearray(_TOGETHER * self._length))
        found = self._pages.setdefault(page, empty)
        found.digests[index * self._length : (index + 1) * self._length] = digest
        found.is_there[index] = True


def _zeros(running: _Running, stop: int) -> None:
    while running.position < stop:
        count = min(stop - running.position, len(_ZEROS))
        running.hash.update(_ZEROS[:count])
        running.position += count
