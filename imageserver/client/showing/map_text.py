# SPDX-License-Identifier: Apache-2.0
"""The map of an image on a terminal: rows of cells, an offset before each, a legend below.

        0 B ████████▓░······
      1 MiB ········▒███████

Between rows and legend stands how much one character is, here 64 KiB.
"""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imageserver.client.showing.map_cells import (
    ASCII,
    BLOCKS,
    Canvas,
    Glyphs,
    rows_for,
    rows_of,
)
from imageserver.client.showing.terminal import speaks_utf8, write
from imageserver.client.showing.units import share_text, size_text
from imageserver.core.cells import Cell, Kind

_STYLES = {
    Kind.DATA: "blue",
    Kind.ZERO: "bright_black",
    Kind.DIRTY: "bold yellow",
    Kind.DIRTY_ZERO: "magenta",
}
#: Columns of the offset before each row.
_OFFSET_COLUMNS = 10
#: Cells of a row are a multiple of this: offsets and cells become round numbers.
_STEP = 16
#: Columns of the legend, on however narrow a terminal.
_LEGEND_COLUMNS = 80
#: Lines of a terminal that the legend and the prompt need, and most rows of cells by default.
_OTHER_LINES, _MOST_ROWS = 10, 16


class Sheet:
    """Where a map is drawn: how wide, how high, with which characters."""

    def __init__(self, width: int | None, rows: int | None, *, plain: bool) -> None:
        self.console = Console(highlight=False, soft_wrap=True, width=width)
        room = self.console.width - _OFFSET_COLUMNS
        self.columns = max(room // _STEP * _STEP, min(room, _STEP))
        self._rows = rows
        self.glyphs = BLOCKS if speaks_utf8() and not plain else ASCII

    def canvas(self, size: int) -> Canvas:
        """Return an empty canvas with as many cells as the sheet shows of so many bytes."""
        most = max(2, min(_MOST_ROWS, self.console.height - _OTHER_LINES))
        rows = self._rows or rows_for(size, self.columns, most)
        return Canvas(size, self.columns * rows)


#: Why all counts as dirty, by the bitmap that the server uses: see ``Remote.bitmap``.
_WHY = {None: "there is no bitmap, or everything has changed", "": "the server uses no bitmap"}


def write_map(
    canvas: Canvas, names: dict[Kind, str], sheet: Sheet, bitmap: str | None = None
) -> None:
    """Write a map to stdout; ``names`` has the kinds that the legend shows."""
    out = sheet.console
    count = f"{canvas.extents} extent{'s' * (canvas.extents != 1)}"
    out.print(f"{size_text(canvas.size)} ({canvas.size} bytes), {count}\n")
    for row in rows_of(canvas.cells(), sheet.columns):
        offset = Text(f"{size_text(row[0].start):>{_OFFSET_COLUMNS - 1}} ", "bright_black")
        out.print(offset.append_text(_drawn(row, sheet.glyphs)))
    if len(canvas):
        scale = size_text(canvas.size / len(canvas))
        out.print(f"\n{'':{_OFFSET_COLUMNS}}one character is {scale}\n")
    legend = Console(highlight=False, width=_LEGEND_COLUMNS)
    table = _legend(canvas, names, sheet.glyphs, parts=True)
    if legend.measure(table).maximum > Console().width:  # the terminal's, whatever --width says
        table = _legend(canvas, names, sheet.glyphs, parts=False)
    write(legend, table)
    if Kind.DIRTY in names and not any(canvas.totals()[:2]) and canvas.size:
        why = _WHY.get(bitmap, "everything has changed")
        out.print(f"\nAll of it counts as dirty: {why}.")


def _drawn(row: Iterable[Cell], glyphs: Glyphs) -> Text:
    drawn = Text()
    for cell in row:
        style = _STYLES[cell.shown]
        if cell.shown is Kind.DIRTY and 2 * cell.sums[Kind.DATA] >= cell.stop - cell.start:
            style += " on blue"  # mostly clean data
        drawn.append(glyphs.of(cell), style)
    return drawn


def _legend(canvas: Canvas, names: dict[Kind, str], glyphs: Glyphs, *, parts: bool) -> Table:
    """Return the legend; ``parts``: also the characters of cells that a kind fills in part."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for justify in ("left", "left", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    totals = canvas.totals()
    for kind, name in names.items():
        part = glyphs.part(kind) if parts else ""
        table.add_row(
            Text(glyphs.levels[kind][-1], _STYLES[kind]),
            name,
            size_text(totals[kind]),
            share_text(totals[kind], canvas.size),
            Text(f"in part: {part}" if part else "", "bright_black"),
        )
    return table
