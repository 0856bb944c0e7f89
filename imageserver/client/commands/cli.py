# SPDX-License-Identifier: Apache-2.0
"""The command line: options that commands share, and errors as one sentence and a status.

A command gets ``options: Options`` from ``@common_options``; what it raises of ``ClientError``
is told on stderr. Tracebacks are shown with ``--debug`` only.
"""

import contextlib
import functools
import importlib
import io
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import FrameType
from typing import Any

import click

from imageserver import __version__
from imageserver.client.failures import ClientError, Interrupted, LocalFailure
from imageserver.client.http.access import Access
from imageserver.client.http.remote import Remote
from imageserver.client.showing.units import plain_text

#: Command -> the module that has it, imported when it is asked for.
COMMANDS = {
    "download": "imageserver.client.commands.move",
    "upload": "imageserver.client.commands.move",
    "map": "imageserver.client.commands.view",
    "info": "imageserver.client.commands.view",
    "check": "imageserver.client.commands.check",
    "top": "imageserver.client.commands.top",
    "transfer": "imageserver.client.commands.transfer",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What every command understands."""

    cacert: str | None
    cert: str | None
    key: str | None
    unix_socket: str | None
    json: bool
    timeout_seconds: float = 60.0
    patience_seconds: float = 60.0
    quiet: bool = False

    def access(self, url: str) -> Access:
        """Return how to reach a URL with these options."""
        if self.key and not self.cert:
            raise click.UsageError("--key goes with --cert.")
        return Access(url, self.cacert, self.cert, self.key, self.unix_socket, self.timeout_seconds)

    def remote(self, url: str, connections: int = 8) -> Remote:
        """Return the image behind a URL."""
        return Remote(self.access(url), connections)


def common_options(
    *, without: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of every command, but for what means nothing to this one.

    The command gets them as ``options``.
    """

    def add_to(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def called(**given: Any) -> Any:  # noqa: ANN401 - click's
            del given["debug"]  # main's: it looks before the command line is parsed
            names = [name for name in Options.__slots__ if name not in without]
            options = Options(**{name: given.pop(name) for name in names})
            if options.quiet:
                logging.getLogger("imageserver.client").setLevel(logging.ERROR)
            return command(options=options, **given)

        for name, option in reversed(_COMMON.items()):
            if name not in without:
                called = option(called)
        return called

    return add_to


class Seconds(click.FloatRange):
    """A number of seconds; ``nan``, which is in no range and outside none, is refused."""

    name = "number of seconds"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number; refuse what is none."""
        seconds: float = super().convert(value, param, ctx)  # type: ignore[arg-type]
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


#: The longest that a socket can be told to wait is some 24 days.
MAX_WAIT = 1_000_000
_PATH = click.Path(dir_okay=False)
_COMMON = {
    "cacert": click.option("--cacert", type=_PATH, help="Trust these CA certificates (PEM)."),
    "cert": click.option("--cert", type=_PATH, help="Show this client certificate (PEM)."),
    "key": click.option("--key", type=_PATH, help="Its private key, if in a file of its own."),
    "unix_socket": click.option(
        "--unix-socket", metavar="PATH", help="Connect here (@NAME: abstract)."
    ),
    "timeout_seconds": click.option(
        "--timeout",
        "timeout_seconds",
        metavar="SECONDS",
        type=Seconds(min=0.1, max=MAX_WAIT),
        default=60.0,
        show_default=True,
        help="How long the server may be silent.",
    ),
    "patience_seconds": click.option(
        "--patience",
        "patience_seconds",
        metavar="SECONDS",
        type=Seconds(min=0),
        default=60.0,
        show_default=True,
        help="How long to try again without progress.",
    ),
    "quiet": click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors."),
    "json": click.option("--json", is_flag=True, help="Write the result as JSON."),
    "debug": click.option("--debug", is_flag=True, help="Show tracebacks."),
}


class _Commands(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name])
        return getattr(module, cmd_name, None) or getattr(module, f"{cmd_name}_command", None)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; click itself would begin a line, for what is no terminal, too."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as exc:
            if sys.stderr.isatty():
                click.echo(err=True)  # after ^C
            raise Interrupted("interrupted.") from exc


_EPILOG = """\b
Exit status:
    0  done
    1  the server or the network failed
    2  the arguments are wrong
    3  the server refused
    4  contents differ, or a check failed
    5  a file or a program on this side failed
  130  interrupted
  141  nobody reads the output any more
"""


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")
@click.version_option(__version__, prog_name="imagectl")
def imagectl() -> None:
    """Move, show and watch disk images on an image server."""


class OutputLost(LocalFailure):
    """What was asked for is done, but its result cannot be told."""


class OutputUnread(OutputLost):
    """Nobody reads it any more; the shell's status of what SIGPIPE has ended."""

    status = 141


class _Output(io.FileIO):
    """Standard output, whose failures are told from those of other files."""

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        try:
            return super().write(data)
        except BrokenPipeError as exc:
            raise OutputUnread("nobody reads the output any more") from exc
        except OSError as exc:
            raise OutputLost(f"the output cannot be written: {exc.strerror}") from exc


class _Errors(io.FileIO):
    """Standard error: no work fails because nobody takes what is said about it."""

    def write(self, data: Any) -> int:  # noqa: ANN401 - any buffer
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def take_outputs() -> None:
    """Make the process's outputs ones that fail as they should.

    None is one that was closed: its descriptor is /dev/null by now.
    """
    for name, fd, kind in (("stdout", 1, _Output), ("stderr", 2, _Errors)):
        stream = getattr(sys, name)
        text = io.TextIOWrapper(
            io.BufferedWriter(kind(fd, "w", closefd=False)),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",  # an id that the locale has no characters for
            line_buffering=bool(stream and stream.line_buffering),
        )
        setattr(sys, name, text)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell's `&` has it ignored
        signal.signal(number, _interrupt)
    try:
        status = imagectl.main(words, prog_name="imagectl", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
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
    elif isinstance(exc, OutputLost):
        with contextlib.suppress(OSError):  # what is left in buffers would fail again
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)
        if isinstance(exc, OutputUnread):
            return exc.status
    elif not isinstance(exc, ClientError):
        exc = ClientError(f"a defect, which --debug shows: {type(exc).__name__}: {exc}")
    click.echo(f"imagectl: {plain_text(str(exc))}", err=True)
    return exc.status
