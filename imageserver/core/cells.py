# SPDX-License-Identifier: Apache-2.0
"""The map of an image as cells: how many bytes of each kind lie in each of so many equal cells.

    extents      |---data---|------zero------|-dirty-|----zero----|
    cells        |      |      |      |      |      |      |      |
                  all     part   none   part   all    none   none

Extents are added as they arrive and not kept: memory is that of the cells. Sums are exact,
so the cells add up to the extents.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What a byte is; the value is ``zero + 2 * dirty``."""

    DATA = 0
    ZERO = 1
    DIRTY = 2
    DIRTY_ZERO = 3


@dataclass(frozen=True, slots=True)
class Cell:
    """Bytes ``start`` to ``stop`` of an image; ``sums`` of them are of each ``Kind``."""

    start: int
    stop: int
    sums: tuple[int, ...]

    @property
    def shown(self) -> Kind:
        """The kind that is shown: first what an incremental backup reads, then a full one."""
        for kind in (Kind.DIRTY, Kind.DATA, Kind.DIRTY_ZERO):
            if self.sums[kind]:
                return kind
        return Kind.ZERO

    @property
    def level(self) -> int:
        """How much of the cell is of the shown kind: 0 to 3, and 3 only if all is."""
        size, part = self.stop - self.start, self.sums[self.shown]
        return 3 if part == size else min(2, part * 3 // size)


class Canvas:
    """Sums of the extents of an image of ``size`` bytes, in at most ``cells`` cells."""

    def __init__(self, size: int, cells: int) -> None:
        self.size = size
        self.extents = 0
        self._count = min(cells, size)
        self._sums = [array("Q", bytes(8 * self._count)) for _ in Kind]

    def add(self, start: int, length: int, *, zero: bool, dirty: bool = False) -> None:
        """Add an extent that lies in the image."""
        self.extents += 1
        sums = self._sums[zero + 2 * dirty]
        size, count, stop = self.size, self._count, start + length
        index = ((start + 1) * count - 1) // size
        while start < stop:
            end = (index + 1) * size // count  # where the cell ends
            sums[index] += min(end, stop) - start
            start = end
            index += 1

    def __len__(self) -> int:
        return self._count

    def cells(self) -> Iterator[Cell]:
        """Yield the cells, in order."""
        for index, sums in enumerate(zip(*self._sums, strict=True)):
            start, stop = index * self.size // self._count, (index + 1) * self.size // self._count
            yield Cell(start, stop, sums)

    def totals(self) -> tuple[int, ...]:
        """Return the bytes of each kind in the whole image."""
        return tuple(sum(sums) for sums in self._sums)
