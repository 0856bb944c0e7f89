# SPDX-License-Identifier: Apache-2.0
"""``imagectl top``: what a server does now, over all its workers, until q or Ctrl-C.

Where stdout is no terminal, each poll is written below the last one; with --json it is a line.
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
from rich.live import Live

from imageserver.client.commands.options import Options, ascii_option, common_options
from imageserver.client.failures import Refused, Transient
from imageserver.client.http.access import Access
from imageserver.client.http.answers import parse_fields
from imageserver.client.http.transport import Transport
from imageserver.client.showing.status import Status, parse_status, with_rates
from imageserver.client.showing.terminal import is_dumb, speaks_utf8
from imageserver.client.showing.top_table import TopTable

#: A server that is silent for longer counts as gone, in seconds.
_SILENCE = 5.0
#: Longest answer of ``/status`` that is read, in bytes.
_MAX_STATUS = 64 << 20

#: A status, and the problem that keeps us from a newer one, or empty.
Polls = Iterator[tuple[Status, str]]


@click.command("top")
@click.argument("admin_url", metavar="ADMIN_URL")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="Time between two requests.",
)
@click.option("--once", is_flag=True, help="Ask once; rates are averages.")
@ascii_option
@common_options(without=["token_file", "timeout_seconds", "patience_seconds", "quiet"])
def top_command(
    *, admin_url: str, interval: float, once: bool, plain: bool, options: Options
) -> None:
    """Show what runs on a server, what has ended, and its slots.

    ADMIN_URL is an address of its admin listener: http://HOST:PORT or unix:/PATH.
    """
    with closing(_Admin(admin_url, options)) as admin, suppress(KeyboardInterrupt):
        table = TopTable(admin.name, plain=plain or not speaks_utf8())
        polls = _polls(admin, admin.status())  # what fails now is a wrong address
        if once:
            polls, interval = islice(polls, 1), 0.0
        if options.json:
            _write_json(polls, interval)
        elif once or not table.console.is_terminal or is_dumb():
            _print(polls, interval, table)
        else:
            _watch(polls, interval, table)


class _Admin:
    """A server's admin listener."""

    def __init__(self, url: str, options: Options) -> None:
        access = _access(url, options)
        path = urlsplit(access.url).path.rstrip("/").removesuffix("/status")
        self._transport = Transport(access, 1)
        self._target = f"{path}/status?readiness=y"
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
        return parse_status(parse_fields(text), time.monotonic())

    def close(self) -> None:
        self._transport.close()


def _access(url: str, options: Options) -> Access:
    sock = options.unix_socket
    if url.startswith("unix:"):
        url, sock = "http://localhost", url.removeprefix("unix:")
    return Access(url, options.cacert, options.cert, options.key, sock, _SILENCE)


def _polls(admin: _Admin, first: Status) -> Polls:
    """Yield the first status at once, and then one whenever asked."""
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


# Without a terminal


def _write_json(polls: Polls, interval: float) -> None:
    for status, problem in _paced(polls, interval):
        fields = {
            "transfers": [asdict(transfer) for transfer in status.transfers],
            "workers": [asdict(worker) for worker in status.workers],
            "rate": status.rate,
            **asdict(status.lately),
        }
        click.echo(json.dumps(fields | ({"error": problem} if problem else {})))


def _print(polls: Polls, interval: float, table: TopTable) -> None:
    for status, problem in _paced(polls, interval):
        table.console.print(table.drawn(status, problem))


def _paced(polls: Polls, interval: float) -> Polls:
    """Wait before each poll except the first."""
    yield from islice(polls, 1)
    while True:
        sys.stdout.flush()
        time.sleep(interval)
        poll = next(polls, None)
        if poll is None:
            return
        yield poll


# On a terminal


def _watch(polls: Polls, interval: float, table: TopTable) -> None:
    live = Live(console=table.console, screen=True, auto_refresh=False)
    with _keys() as has_quit, live:
        for status, problem in polls:
            live.update(table.drawn(status, problem), refresh=True)
            if has_quit(interval):
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Read single keys; yields a function that waits so many seconds for a q."""
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
    """Wait; stdin is no terminal, so no key can be pressed."""
    time.sleep(seconds)
    return False
