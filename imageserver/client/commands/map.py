# SPDX-License-Identifier: Apache-2.0
"""``imagectl map``: where an image's data is, as text, JSON or SVG. Changes nothing.

Extents are used as they come, so that millions of them need no memory. An image's id is a right
to use it, so neither a map nor its title has it.
"""

import json
import sys
from collections.abc import Iterable
from contextlib import closing

import click

from imageserver.client.backoff import retried_start, retried_while_busy
from imageserver.client.commands.options import Options, ascii_option, common_options
from imageserver.client.failures import LocalFailure, Refused
from imageserver.client.http.remote import Remote
from imageserver.client.showing.map_cells import KIND_NAMES, Canvas, check_end, totals_by_name
from imageserver.client.showing.map_svg import drawing
from imageserver.client.showing.map_text import Sheet, write_map
from imageserver.core.extents import Extent

#: Columns and rows of a drawing.
_SVG_COLUMNS, _SVG_ROWS = 96, 32


@click.command("map")
@click.argument("url")
@click.option(
    "--context",
    type=click.Choice(["zero", "dirty"]),
    default="zero",
    show_default=True,
    help="zero: data and zeros; dirty: also what has changed since the bitmap was made.",
)
@click.option("--width", type=click.IntRange(20, 10_000), help="Columns; default: the terminal's.")
@click.option("--rows", type=click.IntRange(1, 10_000), help="Rows of the picture.")
@ascii_option
@click.option("--svg", type=click.Path(dir_okay=False), help="Draw into this file instead.")
@click.option("--title", default="disk image", show_default=True, help="What a drawing is called.")
@common_options(without=["quiet"])
def map_command(  # noqa: PLR0913 - one parameter per option
    *,
    url: str,
    context: str,
    width: int | None,
    rows: int | None,
    plain: bool,
    svg: str | None,
    title: str,
    options: Options,
) -> None:
    """Show where an image's data is."""
    if svg and options.json:
        raise click.UsageError("--svg and --json exclude each other.")
    with closing(options.remote(url)) as remote:
        seconds = options.patience_seconds
        if not retried_while_busy(remote.abilities, seconds).has("extents"):
            raise Refused("the server has no extents of this image, so there is nothing to draw")
        size = retried_while_busy(remote.size, seconds)
        extents = retried_start(lambda: remote.extents(context), seconds) if size else iter(())
        names = KIND_NAMES[context]
        if svg:
            canvas = Canvas(size, _SVG_COLUMNS * (rows or _SVG_ROWS)).filled(extents)
            _save(svg, drawing(title, canvas, _SVG_COLUMNS, names))
        elif options.json:
            _write_json(size, context, extents, remote)
        else:
            sheet = Sheet(width, rows, plain=plain)
            canvas = sheet.canvas(size).filled(extents)
            write_map(canvas, names, sheet, remote.bitmap)


def _save(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as exc:
        raise LocalFailure(f"cannot write {path}: {exc.strerror}") from exc


def _write_json(size: int, context: str, extents: Iterable[Extent], remote: Remote) -> None:
    """Write one extent a line as they come; behind them the totals, and the bitmap if told."""
    totals, count, end = [0, 0, 0, 0], 0, 0
    out = sys.stdout
    out.write(f'{{"size":{size},"context":"{context}","extents":[')
    for start, length, zero, dirty in extents:
        out.write(",\n" if count else "\n")
        state = f',"dirty":{_word(dirty)}' if context == "dirty" else ""
        out.write(f'{{"start":{start},"length":{length}{state},"zero":{_word(zero)}}}')
        totals[zero + 2 * dirty] += length
        count, end = count + 1, start + length
    check_end(end, size)
    summary = json.dumps(totals_by_name(totals, context), separators=(",", ":"))
    bitmap = "" if remote.bitmap is None else f',"bitmap":{json.dumps(remote.bitmap or None)}'
    out.write(f'],\n"count":{count},"totals":{summary}{bitmap}}}\n')


def _word(value: object) -> str:
    return "true" if value else "false"
