# SPDX-License-Identifier: Apache-2.0
"""``imagectl upload``: makes the image on the server what FILE is."""

import json
from dataclasses import asdict
from typing import Any

import click

from imageserver.client.commands.options import FORMAT, Options, common_options, connections_option
from imageserver.client.moving.upload import Wanted, upload
from imageserver.client.showing.progress import watcher
from imageserver.client.showing.units import pace_text, size_text

_WAYS = {None: "", "checksum": ", verified by checksum", "reading": ", verified by reading back"}


@click.command("upload")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("url")
@click.option("--format", type=FORMAT, help="Format of FILE; default: raw.")
@connections_option
@click.option("--backing", is_flag=True, help="Upload what a qcow2 FILE is based on, too.")
@click.option("--pad", is_flag=True, help="FILE may be smaller: the rest becomes zeros.")
@click.option(
    "--verify", is_flag=True, help="Compare with the server's checksum, or read the image back."
)
@click.option(
    "--no-digests",
    "digests",
    flag_value=False,
    default=True,
    help="Do not hash what is sent for the server to verify.",
)
@click.option("--force", is_flag=True, help="Also upload a qcow2 FILE that is damaged.")
@click.option(
    "--no-flush", "flush", flag_value=False, default=True, help="Do not wait for stable storage."
)
@common_options()
def upload_command(options: Options, url: str, **given: Any) -> None:  # noqa: ANN401 - click's
    """Upload FILE into the image at URL; holes become zeros."""
    wanted = Wanted(patience_seconds=options.patience_seconds, **given)
    remote = options.remote(url)
    with watcher(quiet=options.quiet) as watch:
        result = upload(remote, wanted, watch)
    if options.json:
        click.echo(json.dumps({"file": wanted.file, **asdict(result)}))
    elif not options.quiet:
        flushed, verified = ", flushed" * result.flushed, _WAYS[result.verified_by]
        click.echo(
            f"{wanted.file}: {size_text(result.size)}, of which {size_text(result.data)} data;"
            f" {pace_text(result.data, result.seconds)}{flushed}{verified}"
        )
