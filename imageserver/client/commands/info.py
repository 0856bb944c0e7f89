# SPDX-License-Identifier: Apache-2.0
"""``imagectl info``: an image's size, and what its server can do with it. Changes nothing."""

import json
from contextlib import closing
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imageserver.client.backoff import retried_start, retried_while_busy
from imageserver.client.commands.options import Options, common_options
from imageserver.client.showing.map_cells import Canvas, totals_by_name
from imageserver.client.showing.terminal import write
from imageserver.client.showing.units import plain_text, share_text, size_text


@click.command("info")
@click.argument("url")
@click.option("--extents", is_flag=True, help="Add up how much is data: takes the image's lock.")
@common_options(without=["quiet"])
def info_command(*, url: str, extents: bool, options: Options) -> None:
    """Show an image's size, and what its server can do with it."""
    with closing(options.remote(url)) as remote:
        seconds = options.patience_seconds
        abilities = retried_while_busy(remote.abilities, seconds)
        size = retried_while_busy(remote.size, seconds)
        facts: dict[str, Any] = {
            "size": size,
            "features": sorted(abilities.features),
            "max_readers": abilities.max_readers,
            "max_writers": abilities.max_writers,
            "methods": sorted(abilities.methods),
            "unix_socket": abilities.unix_socket,
        }
        if extents:
            found = retried_start(remote.extents, seconds) if size else iter(())
            canvas = Canvas(size, 1).filled(found)
            totals = totals_by_name(canvas.totals(), "zero")
            facts["extents"] = {"count": canvas.extents} | totals
    if options.json:
        click.echo(json.dumps(facts, separators=(",", ":")))
    else:
        _write_table(facts)


def _write_table(facts: dict[str, Any]) -> None:
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
