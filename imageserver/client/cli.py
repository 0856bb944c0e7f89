# SPDX-License-Identifier: Apache-2.0
"""The command line: options that commands share, and errors as one sentence and a status.

A command gets ``options: Options`` from ``@common_options``; what it raises of ``ClientError``
is told on stderr. Tracebacks are shown with ``--debug`` only.
"""

import functools
import importlib
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click

from imageserver import __version__
from imageserver.client.errors import ClientError, Interrupted
from imageserver.client.remote import Remote
from imageserver.client.transport import Access

#: Command -> the module that has it, imported when it is asked for, and one line of help.
COMMANDS = {
    "download": "imageserver.client.commands_move",
    "upload": "imageserver.client.commands_move",
    "map": "imageserver.client.commands_view",
    "info": "imageserver.client.commands_view",
    "check": "imageserver.client.commands_check",
    "top": "imageserver.client.commands_top",
    "transfer": "imageserver.client.commands_transfer",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What every command understands."""

    cacert: str | None
    cert: str | None
    key: str | None
    unix_socket: str | None
    timeout_seconds: float
    patience_seconds: float
    quiet: bool
    json: bool

    def access(self, url: str) -> Access:
        """Return how to reach a URL with these options."""
        return Access(url, self.cacert, self.cert, self.key, self.unix_socket, self.timeout_seconds)

    def remote(self, url: str, connections: int = 8) -> Remote:
        """Return the image behind a URL."""
        return Remote(self.access(url), connections)


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that every command has; the command gets them as ``options``."""

    @functools.wraps(command)
    def called(**given: Any) -> Any:  # noqa: ANN401 - click's
        del given["debug"]  # main's: it looks before the command line is parsed
        names = Options.__slots__
        return command(options=Options(**{name: given.pop(name) for name in names}), **given)

    for option in reversed(_COMMON):
        called = option(called)
    return called


_PATH = click.Path(dir_okay=False)
_COMMON = (
    click.option("--cacert", type=_PATH, help="Trust these CA certificates (PEM)."),
    click.option("--cert", type=_PATH, help="Show this client certificate (PEM)."),
    click.option("--key", type=_PATH, help="Its private key, if in a file of its own."),
    click.option("--unix-socket", metavar="PATH", help="Connect here (@NAME: abstract)."),
    click.option(
        "--timeout",
        "timeout_seconds",
        type=click.FloatRange(min=0.1),
        default=60.0,
        show_default=True,
        help="Seconds that the server may be silent.",
    ),
    click.option(
        "--patience",
        "patience_seconds",
        type=click.FloatRange(min=0),
        default=60.0,
        show_default=True,
        help="Seconds without progress that are spent on trying again.",
    ),
    click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors."),
    click.option("--json", is_flag=True, help="Write the result as JSON."),
    click.option("--debug", is_flag=True, help="Show tracebacks."),
)


class _Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        try:
            module = importlib.import_module(COMMANDS[cmd_name])
        except ModuleNotFoundError:
            return None
        return getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_command", None)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="imagectl")
def imagectl() -> None:
    """Move, show and watch disk images on an image server."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's `&` has it ignored
        signal.signal(number, _interrupt)
    try:
        status = imagectl.main(words, prog_name="imagectl", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001 - the last to see any
        if "--debug" in words:
            traceback.print_exc()
        return _tell(exc)
    return status if isinstance(status, int) else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _tell(exc: BaseException) -> int:
    """Say what happened in one sentence; return the exit status."""
    if isinstance(exc, click.ClickException):
        exc.show()
        return exc.exit_code
    if isinstance(exc, KeyboardInterrupt | click.Abort):
        exc = Interrupted("interrupted.")
    elif not isinstance(exc, ClientError):
        exc = ClientError(f"a defect, which --debug shows: {type(exc).__name__}: {exc}")
    click.echo(f"imagectl: {exc}", err=True)
    return exc.status
