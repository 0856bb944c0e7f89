# SPDX-License-Identifier: Apache-2.0
"""``imagectl download``: makes FILE what the image on the server is."""

import json
from dataclasses import asdict
from typing import Any

import click

from imageserver.client.commands.options import FORMAT, Options, common_options, connections_option
from imageserver.client.moving.download import download
from imageserver.client.moving.wanted import Wanted
from imageserver.client.showing.progress import watcher
from imageserver.client.showing.units import pace_text, size_text

_WAYS = {None: "", "checksum": ", verified by checksum", "samples": ", verified with samples"}


@click.command("download")
@click.argument("url")
@click.argument("file", type=click.Path())
@click.option("--format", type=FORMAT, default="raw", show_default=True, help="Format of FILE.")
@connections_option
@click.option("--incremental", is_flag=True, help="Fetch only what has changed, into FILE.")
@click.option(
    "--base",
    type=click.Path(exists=True, dir_okay=False),
    help="Make FILE a qcow2 overlay of this image instead.",
)
@click.option("--base-format", type=FORMAT, help="Format of that image; default: raw.")
@click.option(
    "--verify", is_flag=True, help="Read FILE back, and compare it with the server's checksum."
)
@click.option("--force", is_flag=True, help="Replace FILE.")
@click.option("--restart", is_flag=True, help="Do not resume an interrupted download.")
@common_options()
def download_command(options: Options, url: str, **given: Any) -> None:  # noqa: ANN401 - click's
    """Download the image at URL into FILE; holes stay holes."""
    if given["file"] == "-":
        raise click.UsageError("a pipe has no holes: name a FILE (a file called -: ./-).")
    if given["base"]:
        if not given["incremental"]:
            raise click.UsageError("--base goes with --incremental.")
        given["format"] = "qcow2"
    elif given["base_format"]:
        raise click.UsageError("--base-format goes with --base.")
    wanted = Wanted(patience_seconds=options.patience_seconds, **given)
    remote = options.remote(url)
    with watcher(quiet=options.quiet) as watch:
        result = download(remote, wanted, watch)
    if options.json:
        click.echo(json.dumps({"file": wanted.file, **asdict(result)}))
    elif not options.quiet:
        resumed = f", {size_text(result.resumed)} were there already" if result.resumed else ""
        verified = _WAYS[result.verified_by]
        kind = "changed data" if wanted.incremental else "data"
        click.echo(
            f"{wanted.file}: {size_text(result.size)}, of which {size_text(result.data)} "
            f"{kind}{resumed}; {pace_text(result.moved, result.seconds)}{verified}"
        )
