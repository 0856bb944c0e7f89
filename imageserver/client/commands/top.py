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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from urllib.parse import urlsplit

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from imageserver.client.commands.cli import Options, common_options
from imageserver.client.failures import Refused, Transient
from imageserver.client.http.access import Access
from imageserver.client.http.transport import Transport
from imageserver.client.showing.table import (
    Running,
    Status,
    bar,
    parse_status,
    with_rates,
    workers_line,
)
from imageserver.client.showing.terminal import is_dumb, speaks_utf8
from imageserver.client.showing.units import rate_text, size_text, time_text

#: A server that is silent for longer counts as gone, in seconds.
_SILENCE = 5.0
#: Columns of a terminal from which on there is room for more.
_WIDE = 110
#: Most of an id that is shown: over TCP ids have as much.
_ID_WIDTH = 12
#: Columns of a bar: as many as are left, but not fewer than tell something.
_BAR, _WIDE_BAR, _LEAST_BAR = 12, 24, 4
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
        except (ValueError, RecursionError):
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
        """Return what fits: of a narrow terminal the bar gets what is left, if that is some."""
        wide = self.console.width >= _WIDE
        rows = [_texts(transfer, wide=wide) for transfer in status.transfers]
        columns = _fitting(_WIDE_COLUMNS if wide else _COLUMNS, rows, self.console.width)
        left = self.console.width - sum(width + 1 for _, width in columns)
        bar_width = min(_WIDE_BAR if wide else _BAR, left)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
        for column, width in columns:
            has_bar = column.name == "done" and bar_width >= _LEAST_BAR
            if has_bar:
                table.add_column("done", no_wrap=True, min_width=bar_width)
            table.add_column(
                "" if has_bar else column.name,
                justify="left" if column.name in _LEFT else "right",
                no_wrap=True,
                min_width=width,
            )
        for transfer, texts in zip(status.transfers, rows, strict=True):
            cells = []
            for column, _width in columns:
                if column.name == "done" and bar_width >= _LEAST_BAR:
                    cells.append(Text(bar(transfer.share, bar_width, plain=self._plain), "blue"))
                cells.append(Text(texts[column.name], column.style))
            table.add_row(*cells)
        return table


@dataclass(frozen=True, slots=True)
class _Column:
    """A column; ``least``: so wide that nothing moves from look to look."""

    name: str
    least: int = 0
    style: str = ""


_COLUMNS = (
    _Column("id"),
    _Column("operation", style="cyan"),
    _Column("client"),
    _Column("worker", style="bright_black"),
    _Column("done", 5),
    _Column("rate", 10),
    _Column("age", 8),
)
_WIDE_COLUMNS = (*_COLUMNS, _Column("moved", 20), _Column("left", 8))
_LEFT = {"id", "operation", "client"}
#: What is left out where there is no room, the first first: rate and worker are what one is for.
_DISPENSABLE = ("left", "moved", "age", "client", "operation", "id")


def _fitting(
    columns: Iterable[_Column], rows: Sequence[dict[str, str]], room: int
) -> list[tuple[_Column, int]]:
    """Return the columns that fit into so many characters, with their widths."""
    found = [
        (each, max(each.least, len(each.name), *(len(row[each.name]) for row in rows)))
        for each in columns
    ]
    for name in _DISPENSABLE:
        if sum(width + 1 for _, width in found) - 1 <= room:
            break
        found = [(each, width) for each, width in found if each.name != name]
    return found


def _texts(transfer: Running, *, wide: bool) -> dict[str, str]:
    """Return what stands in the columns."""
    share, left = transfer.share, transfer.seconds_left
    whole = f" of {size_text(transfer.expected)}" if transfer.expected else ""
    return {
        "id": transfer.id if wide else transfer.id[:_ID_WIDTH],
        "operation": transfer.operation,
        "client": transfer.client,
        "worker": str(transfer.worker),
        "done": "" if share is None else f"{int(share * 100)} %",
        "rate": rate_text(transfer.rate),
        "age": time_text(transfer.age),
        "moved": size_text(transfer.done) + whole,
        "left": "" if left is None else time_text(left),
    }
