# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share; a command gets them parsed, as ``options: Options``."""

import functools
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from imageserver.client.http.access import Access
from imageserver.client.local.token_file import read_token, token_of_environment

if TYPE_CHECKING:
    from imageserver.client.http.remote import Remote

#: The longest that a socket can be told to wait is some 24 days.
MAX_WAIT = 1_000_000


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
    token_file: str | None = None

    def access(self, url: str) -> Access:
        """Return how to reach a URL with these options."""
        if self.key and not self.cert:
            raise click.UsageError("--key goes with --cert.")
        tls = self.cacert, self.cert, self.key
        token = read_token(self.token_file) if self.token_file else token_of_environment()
        return Access(url, *tls, self.unix_socket, self.timeout_seconds, token)

    def remote(self, url: str) -> "Remote":
        """Return the image behind a URL."""
        from imageserver.client.http.remote import Remote  # noqa: PLC0415 - not every command's

        return Remote(self.access(url))


def common_options(
    *, without: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the common options to a command, except those that mean nothing to it."""

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
    """A number of seconds; ``nan``, which no bound excludes, is refused."""

    name = "number of seconds"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the number, or fail."""
        seconds: float = super().convert(value, param, ctx)  # type: ignore[arg-type]
        if math.isnan(seconds):
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return seconds


_PATH = click.Path(dir_okay=False)
_COMMON = {
    "cacert": click.option("--cacert", type=_PATH, help="Trust these CA certificates (PEM)."),
    "cert": click.option("--cert", type=_PATH, help="Present this client certificate (PEM)."),
    "key": click.option("--key", type=_PATH, help="Its private key, if in a file of its own."),
    "unix_socket": click.option(
        "--unix-socket", metavar="PATH", help="Connect here (@NAME: abstract)."
    ),
    "token_file": click.option(
        "--token-file",
        type=_PATH,
        help="Show the token in this file.  [env var, with the token itself: IMAGECTL_TOKEN]",
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
        help="How long to retry without progress.",
    ),
    "quiet": click.option("--quiet", "-q", is_flag=True, help="Print errors only."),
    "json": click.option("--json", is_flag=True, help="Write the result as JSON."),
    "debug": click.option("--debug", is_flag=True, help="Show tracebacks."),
}
#: Of ``download`` and ``upload``.
FORMAT = click.Choice(["raw", "qcow2"])
connections_option = click.option(
    "--connections",
    "-n",
    type=click.IntRange(1, 64),  # more than any server has readers for
    metavar="N",
    help="Connections to use; default: 4, fewer to this machine.",
)
#: Of ``map`` and ``top``.
ascii_option = click.option(
    "--ascii", "plain", is_flag=True, help="Draw with ASCII characters only."
)
