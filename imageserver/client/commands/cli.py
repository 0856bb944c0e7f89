# SPDX-License-Identifier: Apache-2.0
"""The ``imagectl`` command: runs one command, reports its error, returns the exit status.

    imagectl map URL         ``commands.map`` is imported, its ``map_command`` called
    it raises ClientError    one sentence on stderr, and the status that ``failures`` has
    it raises anything else  a defect: one sentence, too

With --debug the traceback is shown as well.
"""

import importlib
import signal
import sys
import traceback
from types import FrameType

import click

from imageserver import __version__
from imageserver.client.commands.outputs import drop_output
from imageserver.client.failures import ClientError, Interrupted, OutputLost, OutputUnread
from imageserver.client.interrupts import seen_while_waiting
from imageserver.client.showing.units import plain_text

#: Each is a module beside this one, imported when the command is used, and has NAME_command.
COMMANDS = ("download", "upload", "map", "info", "checksum", "check", "top", "transfer")
_EPILOG = """\b
Exit status:
    0  done
    1  the server or the network failed
    2  the arguments are wrong
    3  the server refused
    4  contents differ, or a check failed
    5  a local file or program failed
  130  interrupted
  141  the reader of the output has gone
"""


class _Commands(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"imageserver.client.commands.{cmd_name}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; click alone would write a newline for ^C where there is no terminal."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:
            if sys.stderr.isatty():
                click.echo(err=True)  # after ^C
            raise Interrupted("interrupted.") from exc


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
@click.version_option(__version__, prog_name="imagectl")
def imagectl() -> None:
    """Move, show and watch disk images on an image server."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's `&` has SIGINT ignored
        signal.signal(number, _interrupt)
    try:
        with seen_while_waiting():
            status = imagectl.main(words, prog_name="imagectl", standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001 - the last to see any
        if "--debug" in words:
            traceback.print_exc()
        return _report(exc)
    return status if isinstance(status, int) else 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _report(exc: BaseException) -> int:
    """Write one sentence about an error to stderr; return the exit status."""
    if isinstance(exc, click.ClickException):
        exc.show()
        return exc.exit_code
    if isinstance(exc, KeyboardInterrupt | click.Abort):
        exc = Interrupted("interrupted.")
    elif isinstance(exc, OutputLost):
        drop_output()
        if isinstance(exc, OutputUnread):
            return exc.status
    elif not isinstance(exc, ClientError):
        exc = ClientError(f"a defect, which --debug shows: {type(exc).__name__}: {exc}")
    click.echo(f"imagectl: {plain_text(str(exc))}", err=True)
    return exc.status
