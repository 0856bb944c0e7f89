# SPDX-License-Identifier: Apache-2.0
"""The map of an image as SVG: one self-contained text, for browsers and reports.

Rows of cells as in the terminal. Neighbours that look alike are one rectangle, so that the
text grows with what there is to see. Every rectangle says in a ``<title>`` what it shows (a
tooltip), the whole says it in ``<desc>``. Colours follow the viewer's light or dark scheme.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from imageserver.client.showing.map_cells import Canvas, rows_of
from imageserver.client.showing.units import share_text, size_text
from imageserver.core.cells import Cell, Kind

_WIDTH, _ROW, _GAP = 960, 18, 3
_LEFT, _TOP, _LINE = 90, 40, 22
#: Opacity of a level: also the faintest is seen.
_OPACITY = (0.35, 0.55, 0.8, 1.0)
_STYLE = """
text{font:13px system-ui,sans-serif;fill:#1f2328}
.title{font-size:16px;font-weight:600}
.scale{font-size:11px;fill:#59636e;text-anchor:end}
.back{fill:#fff}.k0{fill:#2563eb}.k1{fill:#d8dee4}.k2{fill:#d97706}.k3{fill:#a16ee0}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.scale{fill:#9198a1}
.back{fill:#0d1117}.k0{fill:#4f8ef7}.k1{fill:#2b3138}.k2{fill:#f0a63a}.k3{fill:#b98cf0}}
"""


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring cells of one row that look alike."""

    column: int
    cells: Sequence[Cell]

    def sums(self) -> list[int]:
        return [sum(cell.sums[kind] for cell in self.cells) for kind in Kind]


def drawing(title: str, canvas: Canvas, columns: int, names: Mapping[Kind, str]) -> str:
    """Draw an image; ``names`` has the kinds that the legend shows."""
    return "\n".join(_lines(title, canvas, columns, names)) + "\n"


def _lines(title: str, canvas: Canvas, columns: int, names: Mapping[Kind, str]) -> Iterator[str]:
    rows = list(rows_of(canvas.cells(), columns))
    bottom = _TOP + len(rows) * (_ROW + _GAP)
    height = bottom + _LINE * (len(names) + 1)
    totals = canvas.totals()
    heading = f"{title}: {size_text(canvas.size)}, {canvas.extents} extents"
    said = "; ".join(_amount(names[kind], totals[kind], canvas.size) for kind in names)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img" aria-labelledby="title desc">'
    )
    yield f'<title id="title">{_escaped(heading)}</title>'
    yield f'<desc id="desc">{_escaped(said)}</desc>'
    yield f"<style>{_STYLE}</style>"
    yield f'<rect class="back" width="{_WIDTH}" height="{height}"/>'
    yield f'<text class="title" x="12" y="24">{_escaped(heading)}</text>'
    width = (_WIDTH - _LEFT - 12) / columns
    for number, row in enumerate(rows):
        y = _TOP + number * (_ROW + _GAP)
        yield f'<text class="scale" x="{_LEFT - 8}" y="{y + 13}">{size_text(row[0].start)}</text>'
        for run in _runs(row):
            yield _rectangle(run, width, y, names)
    for number, kind in enumerate(names):
        y = bottom + _LINE * (number + 1)
        yield f'<rect class="k{int(kind)}" x="{_LEFT}" y="{y - 11}" width="13" height="13"/>'
        text = _escaped(_amount(names[kind], totals[kind], canvas.size))
        yield f'<text x="{_LEFT + 22}" y="{y}">{text}</text>'
    yield "</svg>"


def _runs(row: Sequence[Cell]) -> Iterator[_Run]:
    begin = 0
    for column in range(1, len(row) + 1):
        if column == len(row) or _look(row[column]) != _look(row[begin]):
            yield _Run(begin, row[begin:column])
            begin = column


def _look(cell: Cell) -> tuple[Kind, int]:
    return cell.shown, cell.level


def _rectangle(run: _Run, width: float, y: int, names: Mapping[Kind, str]) -> str:
    first, last = run.cells[0], run.cells[-1]
    size = last.stop - first.start
    parts = ", ".join(
        f"{names.get(kind, kind.name.lower())} {share_text(part, size)}"
        for kind, part in zip(Kind, run.sums(), strict=True)
        if part
    )
    tip = f"{size_text(first.start)} to {size_text(last.stop)}: {parts}"
    box = (
        f'x="{_LEFT + run.column * width:.2f}" y="{y}" '
        f'width="{len(run.cells) * width:.2f}" height="{_ROW}"'
    )
    opacity = _OPACITY[first.level]
    back = "" if opacity == 1 else f'<rect class="k1" {box}/>'
    fill = "" if opacity == 1 else f' fill-opacity="{opacity}"'
    body = f'<rect class="k{int(first.shown)}" {box}{fill}/>'
    return f"<g>{back}{body}<title>{_escaped(tip)}</title></g>"


def _escaped(words: str) -> str:
    return escape(words, quote=False)


def _amount(name: str, part: int, size: int) -> str:
    return f"{name}: {size_text(part)} ({share_text(part, size)})"
