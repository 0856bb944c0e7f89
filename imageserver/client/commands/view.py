# SPDX-License-Identifier: Apache-2.0
"""``imagectl map`` and ``info``: what an image is like. Both change nothing.

Extents are looked at as they come, so that millions of them need no memory. An image's id is
a right to use it, so neither a picture nor a title has it.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imageserver.client.checking.asking import answered
from imageserver.client.commands.cli import Options, common_options
from imageserver.client.failures import Failed, LocalFailure, Refused
from imageserver.client.http.remote import Remote
from imageserver.client.showing.picture import (
    ASCII,
    BLOCKS,
    CLEAN_NAMES,
    NAMES,
    Canvas,
    Cell,
    Glyphs,
    Kind,
    rows_for,
    rows_of,
)
from imageserver.client.showing.svg import drawing
from imageserver.client.showing.terminal import speaks_utf8, write
from imageserver.client.showing.units import plain_text, share_text, size_text
from imageserver.core.extents import Extent

_STYLES = {Kind.DATA: "blue", Kind.ZERO: "bright_black", Kind.DIRTY: "bold yellow"} | {
    Kind.DIRTY_ZERO: "magenta"
}
#: Columns of the offsets before each row.
_SCALE = 10
#: Columns of the picture are a multiple of this: offsets and cells become round numbers.
_STEP = 16
#: Columns of the legend, on however narrow a terminal.
_LEGEND_WIDTH = 80
#: Lines of a terminal that the legend and the prompt want.
_OTHER_LINES = 10
_MOST_ROWS = 16
#: Columns and rows of a drawing.
_SVG_COLUMNS, _SVG_ROWS = 96, 32
_PLAIN_KINDS = (Kind.DATA, Kind.ZERO)


@click.command("map")
@click.argument("url")
@click.option(
    "--context",
    type=click.Choice(["zero", "dirty"]),
    default="zero",
    show_default=True,
    help="Tell data from zeros, or also what has changed since the bitmap was made.",
)
@click.option("--width", type=click.IntRange(20, 10_000), help="Columns; default: the terminal's.")
@click.option("--rows", type=click.IntRange(1, 10_000), help="Rows of the picture.")
@click.option("--ascii", "plain", is_flag=True, help="Draw with ASCII characters only.")
@click.option("--svg", type=click.Path(dir_okay=False), help="Draw into this file instead.")
@click.option("--title", default="disk image", show_default=True, help="What a drawing is called.")
@common_options(without=["quiet"])
def map_command(  # noqa: PLR0913, PLR0917 - one parameter per option
    url: str,
    context: str,
    width: int | None,
    rows: int | None,
    plain: bool,  # noqa: FBT001 - click's
    svg: str | None,
    title: str,
    options: Options,
) -> None:
    """Show where an image's data is."""
    if svg and options.json:
        raise click.UsageError("--svg and --json exclude each other.")
    with closing(options.remote(url)) as remote:
        patience = options.patience_seconds
        if not answered(remote.abilities, patience).has("extents"):
            raise Refused("the server has no extents of this image, so there is nothing to draw")
        size = answered(remote.size, patience)
        extents = begun(remote, size, context, patience)
        if svg:
            canvas = painted(Canvas(size, _SVG_COLUMNS * (rows or _SVG_ROWS)), extents)
            names = _names(context)
            _save(svg, drawing(title, canvas, _SVG_COLUMNS, names))
        elif options.json:
            _write_json(size, context, extents)
        else:
            _show(size, context, extents, _Sheet(width, rows, plain=plain))


def begun(remote: Remote, size: int, context: str, patience: float) -> Iterator[Extent]:
    """Return the extents; what fails before the first of them is tried again."""
    if not size:  # oVirt's daemon has no good answer then
        return iter(())

    def begin() -> tuple[list[Extent], Iterator[Extent]]:
        extents = remote.extents(context)
        first = next(extents, None)
        return ([] if first is None else [first]), extents

    first, rest = answered(begin, patience)
    return chain(first, rest)


def painted(canvas: Canvas, extents: Iterable[Extent]) -> Canvas:
    """Add all extents; they must be those of an image of this size."""
    end = 0
    for start, length, zero, dirty in extents:
        end = start + length
        if end > canvas.size:
            break
        canvas.add(start, length, zero=zero, dirty=dirty)
    _check_end(end, canvas.size)
    return canvas


def _check_end(end: int, size: int) -> None:
    if end != size:
        raise Failed(f"the extents end at {end}, the image at {size}")


def _names(context: str) -> dict[Kind, str]:
    if context == "dirty":
        return CLEAN_NAMES
    return {kind: NAMES[kind] for kind in _PLAIN_KINDS}


def _save(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise LocalFailure(f"cannot write {path}: {exc.strerror}") from exc


# As JSON


def _write_json(size: int, context: str, extents: Iterable[Extent]) -> None:
    """Write extents as they come, one a line; what they add up to stands behind them."""
    totals, count, end = [0, 0, 0, 0], 0, 0
    out = sys.stdout
    out.write(f'{{"size":{size},"context":"{context}","extents":[')
    for start, length, zero, dirty in extents:
        out.write(",\n" if count else "\n")
        state = f',"dirty":{_word(dirty)}' if context == "dirty" else ""
        out.write(f'{{"start":{start},"length":{length}{state},"zero":{_word(zero)}}}')
        totals[zero + 2 * dirty] += length
        count, end = count + 1, start + length
    _check_end(end, size)
    out.write(f'],\n"count":{count},"totals":{_compact(_named(totals, context))}}}\n')


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _word(value: object) -> str:
    return "true" if value else "false"


def _named(totals: Iterable[int], context: str) -> dict[str, int]:
    names = (name.replace(" ", "_") for name in _names(context).values())
    return dict(zip(names, totals, strict=False))


# On the terminal


class _Sheet:
    """Where a picture is drawn: how wide, how high, with which characters."""

    def __init__(self, width: int | None, rows: int | None, *, plain: bool) -> None:
        self.console = Console(highlight=False, soft_wrap=True, width=width)
        room = self.console.width - _SCALE
        self.columns = max(room // _STEP * _STEP, min(room, _STEP))
        self.rows = rows
        self.glyphs = BLOCKS if speaks_utf8() and not plain else ASCII

    def rows_for(self, size: int) -> int:
        most = max(2, min(_MOST_ROWS, self.console.height - _OTHER_LINES))
        return self.rows or rows_for(size, self.columns, most)


def _show(size: int, context: str, extents: Iterable[Extent], sheet: _Sheet) -> None:
    canvas = painted(Canvas(size, sheet.columns * sheet.rows_for(size)), extents)
    out, names = sheet.console, _names(context)
    count = f"{canvas.extents} extent{'s' * (canvas.extents != 1)}"
    out.print(f"{size_text(size)} ({size} bytes), {count}\n")
    for row in rows_of(canvas.cells(), sheet.columns):
        scale = Text(f"{size_text(row[0].start):>{_SCALE - 1}} ", "bright_black")
        out.print(scale.append_text(_drawn(row, sheet.glyphs)))
    if len(canvas):
        out.print(f"\n{'':{_SCALE}}one character is {size_text(size / len(canvas))}\n")
    legend = Console(highlight=False, width=_LEGEND_WIDTH)
    table = _legend(canvas, names, sheet.glyphs, parts=True)
    if legend.measure(table).maximum > Console().width:  # the terminal's, whatever --width says
        table = _legend(canvas, names, sheet.glyphs, parts=False)
    write(legend, table)
    if context == "dirty" and not any(canvas.totals()[:2]) and size:
        out.print("\nAll of it counts as dirty: there is no bitmap, or everything has changed.")


def _drawn(row: Iterable[Cell], glyphs: Glyphs) -> Text:
    drawn = Text()
    for cell in row:
        style = _STYLES[cell.shown]
        if cell.shown is Kind.DIRTY and 2 * cell.sums[Kind.DATA] >= cell.stop - cell.start:
            style += " on blue"  # a little dirt on much data
        drawn.append(glyphs.of(cell), style)
    return drawn


def _legend(canvas: Canvas, names: dict[Kind, str], glyphs: Glyphs, *, parts: bool) -> Table:
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


# info


@click.command("info")
@click.argument("url")
@click.option("--extents", is_flag=True, help="Add up how much is data: takes the image's lock.")
@common_options(without=["quiet"])
def info_command(url: str, extents: bool, options: Options) -> None:  # noqa: FBT001 - click's
    """Show an image's size, and what its server can do with it."""
    with closing(options.remote(url)) as remote:
        patience = options.patience_seconds
        abilities = answered(remote.abilities, patience)
        size = answered(remote.size, patience)
        facts: dict[str, Any] = {
            "size": size,
            "features": sorted(abilities.features),
            "max_readers": abilities.max_readers,
            "max_writers": abilities.max_writers,
            "methods": sorted(abilities.methods),
            "unix_socket": abilities.unix_socket,
        }
        if extents:
            canvas = painted(Canvas(size, 1), begun(remote, size, "zero", patience))
            facts["extents"] = {"count": canvas.extents} | _named(canvas.totals(), "zero")
    if options.json:
        click.echo(_compact(facts))
    else:
        _tell(facts)


def _tell(facts: dict[str, Any]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    size, sock = facts["size"], facts["unix_socket"]
    table.add_row("size", f"{size_text(size)} ({size} bytes)")
    table.add_row("features", Text(plain_text(", ".join(facts["features"])) or "none"))
    table.add_row("methods", Text(plain_text(", ".join(facts["methods"])) or "not told"))
    table.add_row("readers", _limit(facts["max_readers"]))
    table.add_row("writers", _limit(facts["max_writers"]))
    table.add_row("Unix socket", Text(plain_text(sock.replace("\0", "@")) if sock else "none"))
    if found := facts.get("extents"):
        table.add_row("extents", str(found["count"]))
        for name in ("data", "zero"):
            share = share_text(found[name], size)
            table.add_row(name, f"{size_text(found[name])}, {share}")
    write(Console(highlight=False, soft_wrap=True), table)


def _limit(most: int) -> str:
    return f"up to {most}" if most else "none"
