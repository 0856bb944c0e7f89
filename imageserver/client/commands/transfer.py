# SPDX-License-Identifier: Apache-2.0
"""``imagectl transfer add``, ``remove`` and ``list``: by control socket or config directory."""

import json
import os
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imageserver.backends.table import KINDS
from imageserver.client.commands.options import MAX_WAIT, Seconds
from imageserver.client.http.access import Access
from imageserver.client.local.control_socket import ControlSocket
from imageserver.client.local.token_file import read_token
from imageserver.client.local.transfer_files import ConfigDirectory
from imageserver.client.showing.terminal import write
from imageserver.client.showing.units import plain_text
from imageserver.core.transfer import (
    InvalidTransfer,
    Transfer,
    is_valid_id,
    to_fields,
    transfer_from_fields,
)

Place = ControlSocket | ConfigDirectory
#: Columns of the table, more than any row has: a part of an id is of no use.
_WIDTH = 10_000


@click.group("transfer")
def transfer_command() -> None:
    """Add, remove and list the transfers of a server.

    Through its control socket, or as files in its config directory.
    """


def _place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_PLACE):
        command = option(command)
    return command


_PLACE = (
    click.option(
        "--control-socket",
        type=click.Path(dir_okay=False),
        help="The server's control socket.  [env var: IMAGESERVER_CONTROL_SOCKET]",
    ),
    click.option(
        "--config-dir",
        type=click.Path(file_okay=False),
        help="Or its directory of transfer files.  [env var: IMAGESERVER_CONFIG_DIR]",
    ),
    click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks."),
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Write the result as JSON.")


def _place(control_socket: str | None, config_dir: str | None) -> Place:
    if control_socket and config_dir:
        raise click.UsageError("--control-socket and --config-dir exclude each other.")
    if not (control_socket or config_dir):
        control_socket = os.environ.get("IMAGESERVER_CONTROL_SOCKET")
        config_dir = os.environ.get("IMAGESERVER_CONFIG_DIR")
    if control_socket:
        return ControlSocket(control_socket)
    if config_dir:
        return ConfigDirectory(config_dir)
    raise click.UsageError("say where the server looks: --control-socket or --config-dir.")


def _absolute(_context: click.Context, _option: click.Parameter, path: str | None) -> str | None:
    return path and os.path.abspath(path)


@transfer_command.command("add")
@click.option("--nbd", metavar="SOCKET", callback=_absolute, help="Unix socket of an NBD server.")
@click.option("--export", default="", metavar="NAME", help="Its export; default: the empty name.")
@click.option("--bitmap", metavar="NAME", help="The export's dirty bitmap.")
@click.option("--file", metavar="PATH", callback=_absolute, help="Instead: a file or block device.")
@click.option("--raw", is_flag=True, help="The file is a disk, as an NBD image is.")
@click.option("--read-only", is_flag=True, help="Forbid every change.")
@click.option("--idle-timeout", type=int, metavar="SECONDS", help="Expire if unused for so long.")
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False),
    help="Demand the token in this file of every request.",
)
@click.option("--id", "transfer_id", help="Its id; default: a random UUID.")
@click.option("--url", metavar="BASE", help="Also print its URL at this server (http://HOST:PORT).")
@_place_options
@_JSON
def add_command(  # noqa: PLR0913 - one parameter per option
    *,
    nbd: str | None,
    export: str,
    bitmap: str | None,
    file: str | None,
    raw: bool,
    read_only: bool,
    idle_timeout: int | None,
    token_file: str | None,
    transfer_id: str | None,
    url: str | None,
    control_socket: str | None,
    config_dir: str | None,
    as_json: bool,
) -> None:
    """Add a transfer of an image, and print its id.

    Whoever knows the id, and the token if there is one, may use the image.
    """
    if bool(nbd) == bool(file):
        raise click.UsageError("name the image: either --nbd SOCKET or --file PATH.")
    if file and (export or bitmap):
        raise click.UsageError("--export and --bitmap belong to --nbd.")
    if nbd and raw:
        raise click.UsageError("--raw belongs to --file.")
    fields: dict[str, object] = {"backend": "file", "file": file, "format": "raw" if raw else None}
    if nbd:
        fields = {"backend": "nbd", "socket": nbd, "export": export, "export_bitmap": bitmap}
    fields |= {"read_only": read_only, "idle_timeout_seconds": idle_timeout}
    fields["token"] = read_token(token_file) if token_file else None
    where = Access(f"{url.rstrip('/')}/images/") if url else None  # fails before anything is added
    try:
        transfer = transfer_from_fields(
            _id(str(uuid.uuid4()) if transfer_id is None else transfer_id), fields, KINDS
        )
    except InvalidTransfer as exc:
        raise click.UsageError(f"no server would take this: {exc}.") from exc
    _place(control_socket, config_dir).add(transfer)
    told = {"id": transfer.id}
    if where:
        told["url"] = where.url + quote(transfer.id, safe="")
    click.echo(json.dumps(told) if as_json else "\n".join(told.values()))


def _id(text: str) -> str:
    if not is_valid_id(text):
        raise click.UsageError(f"{text!r} cannot be an id.")
    return text


@transfer_command.command("remove")
@click.argument("transfer_id", metavar="ID")
@click.option(
    "--timeout",
    type=Seconds(min=0, max=MAX_WAIT),
    metavar="SECONDS",
    help="Wait so long for requests under way; default: until they end.",
)
@click.option("--force", is_flag=True, help="Cut requests under way.")
@_place_options
def remove_command(
    *,
    transfer_id: str,
    timeout: float | None,
    force: bool,
    control_socket: str | None,
    config_dir: str | None,
) -> None:
    """Remove a transfer; an id that is not known is no error."""
    place = _place(control_socket, config_dir)
    if isinstance(place, ControlSocket):
        place.remove(_id(transfer_id), timeout, force=force)
    elif force or timeout is not None:
        raise click.UsageError(
            "--timeout and --force are for --control-socket: files know no requests."
        )
    else:
        place.remove(_id(transfer_id))


@transfer_command.command("list")
@_place_options
@_JSON
def list_command(*, control_socket: str | None, config_dir: str | None, as_json: bool) -> None:
    """List the registered transfers, or those of the files that count."""
    transfers = _place(control_socket, config_dir).list()
    if as_json:
        shown = [{"id": each.id, "config": to_fields(each)} for each in transfers]
        click.echo(json.dumps({"transfers": shown}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("id", "image", "bitmap", "access", "expires"):
        table.add_column(column, no_wrap=True)
    for transfer in transfers:
        table.add_row(*map(Text, _row(transfer)))
    write(Console(highlight=False, width=_WIDTH), table)


def _row(transfer: Transfer) -> tuple[str, str, str, str, str]:
    place, bitmap = str(transfer.image), str(to_fields(transfer).get("export_bitmap") or "")
    expires = "never" if transfer.idle_seconds is None else f"{transfer.idle_seconds} s unused"
    access = "read" if transfer.read_only else "read, write"
    access += ", token" if transfer.token else ""
    return plain_text(transfer.id), plain_text(place), plain_text(bitmap), access, expires
