# SPDX-License-Identifier: Apache-2.0
"""``imagectl top``: what a server does now, over all its workers, until q or Ctrl-C.

Where stdout is no terminal, each poll is a table below the last one, or a line of JSON.
"""

import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from urllib.parse import urlsplit

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from imageserver.client.access import Access
from imageserver.client.cli import Options, common_options
from imageserver.client.errors import Refused, Transient
from imageserver.client.table import Running, Status, bar, parse_status, with_rates, workers_line
from imageserver.client.terminal import is_dumb, speaks_utf8
from imageserver.client.transport import Transport
from imageserver.client.units import rate_text, size_text, time_text

#: A server that is silent for longer counts as gone, in seconds.
_SILENCE = 5.0
#: Columns of a terminal from which on there is room for more.
_WIDE = 110
#: Most of an id that is shown: over TCP ids have as much.
_ID_WIDTH = 12
_BAR, _WIDE_BAR = 12, 24
_MAX_STATUS = 64 << 20


@click.command("top")
@click.argument("admin_url", metavar="ADMIN_URL")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="Time between two looks.",
)
@click.option("--once", is_flag=True, help="Look once; rates are means.")
@click.option("--ascii", "plain", is_flag=True, help="Draw with ASCII characters only.")
@common_options(without=["timeout_seconds", "patience_seconds", "quiet"])
def top_command(
    *, admin_url: str, interval: float, once: bool, plain: bool, options: Options
) -> None:
    """Show what runs on a server now.

    ADMIN_URL is an address of its admin listener: http://HOST:PORT or unix:/PATH.
    """
    with closing(_Admin(admin_url, options)) as admin, suppress(KeyboardInterrupt):
        show = _Shown(admin.name, plain=plain or not speaks_utf8())
        polls = _polls(admin, admin.status())  # what fails now is a wrong address
        if once:
            polls, interval = islice(polls, 1), 0.0
        if options.json:
            _write_json(polls, interval)
        elif once or not show.console.is_terminal or is_dumb():
            _print(polls, interval, show)
        else:
            _watch(polls, interval, show)


class _Admin:
    """The admin listener."""

    def __init__(self, url: str, options: Options) -> None:
        access = _access(url, options)
        path = urlsplit(access.url).path.rstrip("/").removesuffix("/status")
        self._transport = Transport(access, 1)
        self._target = f"{path}/status"
        self.name = self._transport.name

    def status(self) -> Status:
        try:
            response = self._transport.request("GET", self._target)
        except Refused as exc:
            raise Refused(f"{exc} (is this the admin listener?)", exc.code) from exc
        with self._transport.translated():
            text = response.read(_MAX_STATUS)
            response.drain_conn()
            response.release_conn()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        return parse_status(answer, time.monotonic())

    def close(self) -> None:
        self._transport.close()


def _access(url: str, options: Options) -> Access:
    sock = options.unix_socket
    if url.startswith("unix:"):
        url, sock = "http://localhost", url.removeprefix("unix:")
    return Access(url, options.cacert, options.cert, options.key, sock, _SILENCE)


def _polls(admin: _Admin, first: Status) -> Iterator[tuple[Status, str]]:
    """Yield the status at once and then whenever asked, and what is wrong with it."""
    shown = before = first
    problem = ""
    while True:
        yield shown, problem
        try:
            now = admin.status()
        except Transient as exc:
            problem = f"{exc}; trying again"
            shown = Status((), (), before.taken)
        else:
            shown, before, problem = with_rates(now, before), now, ""


Polls = Iterator[tuple[Status, str]]


# Without a terminal


def _write_json(polls: Polls, interval: float) -> None:
    for status, problem in _paced(polls, interval):
        fields = {
            "transfers": [asdict(transfer) for transfer in status.transfers],
            "workers": [asdict(worker) for worker in status.workers],
            "rate": status.rate,
        }
        click.echo(json.dumps(fields | ({"error": problem} if problem else {})))


def _print(polls: Polls, interval: float, show: "_Shown") -> None:
    for status, problem in _paced(polls, interval):
        show.console.print(show.picture(status, problem))


def _paced(polls: Polls, interval: float) -> Polls:
    """Wait before each poll but the first."""
    yield from islice(polls, 1)
    while True:
        sys.stdout.flush()
        time.sleep(interval)
        poll = next(polls, None)
        if poll is None:
            return
        yield poll


# On a terminal


def _watch(polls: Polls, interval: float, show: "_Shown") -> None:
    live = Live(console=show.console, screen=True, auto_refresh=False)
    with _keys() as has_quit, live:
        for status, problem in polls:
            live.update(show.picture(status, problem), refresh=True)
            if has_quit(interval):
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Read single keys; yields what waits for a q, so many seconds."""
    if not sys.stdin.isatty():
        yield _never
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def has_quit(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0] and os.read(fd, 1) in {b"q", b"Q", b""}:
                return True
        return False

    try:
        tty.setcbreak(fd)
        yield has_quit
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _never(seconds: float) -> bool:
    """Wait where nobody can press a key."""
    time.sleep(seconds)
    return False


class _Shown:
    """How a status looks."""

    def __init__(self, name: str, *, plain: bool) -> None:
        self.console = Console(highlight=False)
        self._name = name
        self._plain = plain

    def picture(self, status: Status, problem: str) -> RenderableType:
        count = len(status.transfers)
        head = Text.assemble(
            (self._name, "bold"),
            f"  {count} transfer{'s' * (count != 1)}  ",
            (rate_text(status.rate), "bold green"),
        )
        lines: list[RenderableType] = [head]
        if problem:
            return Group(head, Text(problem, "bold red"))
        lines.append(Text(workers_line(status.workers), "bright_black"))
        if status.transfers:
            lines += [Text(), self._table(status)]
        return Group(*lines)

    def _table(self, status: Status) -> Table:
        wide = self.console.width >= _WIDE
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
        table.add_column("id", no_wrap=True, max_width=None if wide else _ID_WIDTH)
        for name in ("operation", "client"):
            table.add_column(name, no_wrap=True)
        table.add_column("worker", justify="right", no_wrap=True)
        table.add_column("done", no_wrap=True, min_width=_WIDE_BAR if wide else _BAR)
        columns = [("", 5), ("rate", 10), ("age", 8)] + [("moved", 20), ("left", 8)] * wide
        for name, width in columns:  # wide enough that nothing moves from look to look
            table.add_column(name, justify="right", no_wrap=True, min_width=width)
        for transfer in status.transfers:
            table.add_row(*self._row(transfer, wide=wide))
        return table

    def _row(self, transfer: Running, *, wide: bool) -> Iterator[Text]:
        share = transfer.share
        yield Text(transfer.id)
        yield Text(transfer.operation, "cyan")
        yield Text(transfer.client)
        yield Text(str(transfer.worker), "bright_black")
        yield Text(bar(share, _WIDE_BAR if wide else _BAR, plain=self._plain), "blue")
        yield Text("" if share is None else f"{int(share * 100)} %")
        yield Text(rate_text(transfer.rate))
        yield Text(time_text(transfer.age))
        if wide:
            left = transfer.seconds_left
            whole = f" of {size_text(transfer.expected)}" if transfer.expected else ""
            yield Text(size_text(transfer.done) + whole)
            yield Text("" if left is None else time_text(left))
