# SPDX-License-Identifier: Apache-2.0
"""``imagectl checksum``: a digest of an image on a server, or of a local one. Changes nothing."""

import json
import re
from typing import Any

import click

from imageserver.client.commands.options import FORMAT, Options, common_options, connections_option
from imageserver.client.moving.checksum import Wanted, checksum_of_file, checksum_of_image
from imageserver.client.showing.progress import watcher
from imageserver.client.showing.units import plain_text
from imageserver.core.checksums import (
    ALGORITHMS,
    BLOCK_ALIGN,
    DEFAULT_ALGORITHM,
    MAX_BLOCK_SIZE,
    MIN_BLOCK_SIZE,
)
from imageserver.core.errors import BadRequest

_URL = re.compile("https?://", re.IGNORECASE)


@click.command("checksum")
@click.argument("image", metavar="URL|FILE")
@click.option(
    "--algorithm",
    type=click.Choice(ALGORITHMS),
    metavar="NAME",
    default=DEFAULT_ALGORITHM,
    show_default=True,
    help=f"One of {', '.join(ALGORITHMS)}.",
)
@click.option(
    "--block-size",
    type=click.IntRange(MIN_BLOCK_SIZE, MAX_BLOCK_SIZE),
    metavar="BYTES",
    help=f"Of block hashes: a multiple of {BLOCK_ALIGN}; default: 4 MiB.",
)
@click.option("--format", type=FORMAT, help="Format of FILE; default: raw.")
@click.option("--backing", is_flag=True, help="With what a qcow2 FILE is based on.")
@click.option("--force", is_flag=True, help="Also of a qcow2 FILE that is damaged.")
@connections_option
@common_options()
def checksum_command(options: Options, image: str, **given: Any) -> None:  # noqa: ANN401 - click's
    """Print a digest of the image at URL, or of the disk in FILE.

    URL is not read where its server computes checksums. Block hashes are those of oVirt; whole-…
    are what sha256sum, sha512sum and b2sum print.
    """
    wanted = Wanted(patience_seconds=options.patience_seconds, **given)
    try:
        wanted.recipe()
    except BadRequest as exc:
        raise click.UsageError(f"{exc}.") from exc
    is_url = bool(_URL.match(image))
    if is_url and (wanted.format or wanted.backing or wanted.force):
        raise click.UsageError("--format, --backing and --force are of a FILE.")
    with watcher(quiet=options.quiet) as watch:
        if is_url:
            result = checksum_of_image(options.remote(image), wanted, watch)
        else:
            result = checksum_of_file(image, wanted, watch)
    if options.json:
        fields = {"algorithm": result.algorithm, "block_size": result.block_size}
        fields |= {"checksum": result.checksum, "computed": result.computed}
        click.echo(json.dumps(fields | {"seconds": result.seconds}))
    else:
        click.echo(f"{result.checksum}  {plain_text(image)}")
