# SPDX-License-Identifier: Apache-2.0
"""The map of an image as cells: how many bytes of each kind lie in each of so many equal cells.

    extents      |---data---|------zero------|-dirty-|----zero----|
    cells        |      |      |      |      |      |      |      |
                  all     part   none   part   all    none   none

Extents are added as they arrive and not kept: memory is that of the cells. Sums are exact,
so the cells add up to the extents. Nothing is printed here.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

from imageserver.client.failures import Failed
from imageserver.core.extents import Extent


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

    def filled(self, extents: Iterable[Extent]) -> Self:
        """Add all extents of an image.

        Raises:
            Failed: they do not end where the image does.
        """
        end = 0
        for start, length, zero, dirty in extents:
            end = start + length
            if end > self.size:
                break
            self.add(start, length, zero=zero, dirty=dirty)
        check_end(end, self.size)
        return self

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


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters of each kind, by level: a little, half, most, all."""

    levels: tuple[str, str, str, str]

    def of(self, cell: Cell) -> str:
        """Return a cell's character."""
        return self.levels[cell.shown][cell.level]

    def part(self, kind: Kind) -> str:
        """Return the characters of cells that a kind fills in part; empty if they are the same."""
        full = self.levels[kind][-1]
        return " ".join(self.levels[kind][:-1]) if self.levels[kind][0] != full else ""


#: In the order of ``Kind``. No two kinds look alike, even without colours.
BLOCKS = Glyphs(("░▒▓█", "····", "▘▚▙■", "○○○○"))
ASCII = Glyphs(("-=+#", "....", "ixX@", "0000"))

#: By context: the kinds that it tells apart, as a legend names them.
KIND_NAMES: dict[str, dict[Kind, str]] = {
    "zero": {Kind.DATA: "data", Kind.ZERO: "zero"},
    "dirty": {
        Kind.DATA: "clean data",
        Kind.ZERO: "clean zero",
        Kind.DIRTY: "dirty data",
        Kind.DIRTY_ZERO: "dirty zero",
    },
}
#: A cell need not show less than a cluster of qcow2, in bytes.
_CLUSTER = 65536


def totals_by_name(totals: Iterable[int], context: str) -> dict[str, int]:
    """Return the bytes of each kind as fields of JSON."""
    names = (name.replace(" ", "_") for name in KIND_NAMES[context].values())
    return dict(zip(names, totals, strict=False))


def check_end(end: int, size: int) -> None:
    """Require extents to end where the image does.

    Raises:
        Failed: they do not.
    """
    if end != size:
        raise Failed(f"the extents end at {end}, the image at {size}")


def rows_for(size: int, columns: int, most: int) -> int:
    """Return how many rows show clusters, at most ``most``; a power of 2, for round offsets."""
    wanted = max(1, min(most, -(-size // (columns * _CLUSTER))))
    return 1 << (wanted.bit_length() - 1)


def rows_of(cells: Iterator[Cell], columns: int) -> Iterator[Sequence[Cell]]:
    """Yield the cells row by row; the last row may be shorter."""
    row: list[Cell] = []
    for cell in cells:
        row.append(cell)
        if len(row) == columns:
            yield row
            row = []
    if row:
        yield row
