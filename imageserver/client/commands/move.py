# SPDX-License-Identifier: Apache-2.0
"""``imagectl download`` and ``imagectl upload``: arguments in, results out."""

import json
from dataclasses import asdict
from typing import Any

import click

from imageserver.client.commands.cli import Options, common_options
from imageserver.client.moving import download as downloading
from imageserver.client.moving import upload as uploading
from imageserver.client.moving.target import Wanted
from imageserver.client.showing.progress import watcher
from imageserver.client.showing.units import rate_text, size_text

_FORMAT = click.Choice(["raw", "qcow2"])
#: More connections than any server has readers for.
_CONNECTIONS = click.IntRange(1, 64)
_MOST = "Connections to use; default: 4, fewer to this machine."


@click.command()
@click.argument("url")
@click.argument("file", type=click.Path())
@click.option("--format", type=_FORMAT, default="raw", show_default=True, help="Format of FILE.")
@click.option("--connections", "-n", type=_CONNECTIONS, metavar="N", help=_MOST)
@click.option("--incremental", is_flag=True, help="Fetch only what has changed, into FILE.")
@click.option(
    "--base",
    type=click.Path(exists=True, dir_okay=False),
    help="Make FILE a qcow2 overlay of this image instead.",
)
@click.option("--base-format", type=_FORMAT, help="Format of that image; default: raw.")
@click.option("--verify", is_flag=True, help="Read FILE back, and compare it with what came.")
@click.option("--force", is_flag=True, help="Replace FILE.")
@click.option("--restart", is_flag=True, help="Begin anew what was interrupted.")
@common_options()
def download(options: Options, url: str, **given: Any) -> None:  # noqa: ANN401 - click's
    """Download the image at URL into FILE, holes as holes."""
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
        result = downloading.download(remote, wanted, watch)
    if options.json:
        click.echo(json.dumps({"file": wanted.file, **asdict(result)}))
    elif not options.quiet:
        resumed = f", {size_text(result.resumed)} were there already" if result.resumed else ""
        verified = ", verified" if result.verified else ""
        kind = "changed data" if wanted.incremental else "data"
        click.echo(
            f"{wanted.file}: {size_text(result.size)}, of which {size_text(result.data)} "
            f"{kind}{resumed}; {_pace(result.moved, result.seconds)}{verified}"
        )


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("url")
@click.option("--format", type=_FORMAT, help="Format of FILE; default: raw.")
@click.option("--connections", "-n", type=_CONNECTIONS, metavar="N", help=_MOST)
@click.option("--backing", is_flag=True, help="Upload what a qcow2 FILE is based on, too.")
@click.option("--pad", is_flag=True, help="FILE may be smaller: the rest becomes zeros.")
@click.option("--verify", is_flag=True, help="Read the image back and compare.")
@click.option("--force", is_flag=True, help="Also upload a qcow2 FILE that is damaged.")
@click.option(
    "--no-flush", "flush", flag_value=False, default=True, help="Do not wait for stable storage."
)
@common_options()
def upload(options: Options, url: str, **given: Any) -> None:  # noqa: ANN401 - click's
    """Make the image at URL what FILE is, holes as zeros."""
    wanted = uploading.Wanted(patience_seconds=options.patience_seconds, **given)
    remote = options.remote(url)
    with watcher(quiet=options.quiet) as watch:
        result = uploading.upload(remote, wanted, watch)
    if options.json:
        click.echo(json.dumps({"file": wanted.file, **asdict(result)}))
    elif not options.quiet:
        flushed, verified = ", flushed" * result.flushed, ", verified" * result.verified
        click.echo(
            f"{wanted.file}: {size_text(result.size)}, of which {size_text(result.data)} data;"
            f" {_pace(result.data, result.seconds)}{flushed}{verified}"
        )


def _pace(count: int, seconds: float) -> str:
    return f"{seconds:.1f} s, {rate_text(count / seconds if seconds else 0)}"
