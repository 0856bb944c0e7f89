# SPDX-License-Identifier: Apache-2.0
"""The map of an image in cells (``core/cells.py``), as a terminal or a drawing shows them.

Nothing is printed here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from imageserver.client.failures import Failed
from imageserver.core import cells
from imageserver.core.cells import Cell, Kind
from imageserver.core.extents import Extent


class Canvas(cells.Canvas):
    """Sums of the extents of an image of ``size`` bytes, in at most ``cells`` cells."""

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
