# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a running transfer: a bar on a terminal, a line now and then elsewhere.

Operations know ``Watcher`` only. All of it goes to stderr; stdout has the result.
"""

import contextlib
import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from imageserver.client.units import rate_text, size_text

#: How often a plain line is written, in seconds.
_LINE_SECONDS = 5.0


class Watcher(Protocol):
    """Is told how far an operation is; from one thread."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Say what begins, and how many bytes of ``total`` need not be moved again."""

    def moved(self, count: int) -> None:
        """Say how many bytes have been moved since ``begin``."""

    def note(self, sentence: str) -> None:
        """Say something that matters."""


class Silent:
    """Says nothing."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Ignore it."""

    def moved(self, count: int) -> None:
        """Ignore it."""

    def note(self, sentence: str) -> None:
        """Ignore it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass


class Lines(Silent):
    """Writes a plain line every few seconds, and at the end of a part that had any."""

    def __init__(self) -> None:
        self._what, self._total, self._before, self._count = "", 0, 0, 0
        self._started = self._told = time.monotonic()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Remember it; the first line comes after some seconds."""
        self._end()
        self._what, self._total, self._before, self._count = what, total, done, 0
        self._started = self._told = time.monotonic()

    def moved(self, count: int) -> None:
        """Write a line, if it is time."""
        self._count = count
        if time.monotonic() - self._told >= _LINE_SECONDS:
            self._tell()

    def note(self, sentence: str) -> None:
        """Write it, if anybody takes it: for want of a reader no operation ends."""
        with contextlib.suppress(OSError):
            print(sentence, file=sys.stderr, flush=True)  # noqa: T201 - its output

    def _tell(self) -> None:
        self._told = time.monotonic()
        done, seconds = self._before + self._count, self._told - self._started
        percent = 100 * done // self._total if self._total else 100
        rate = rate_text(self._count / seconds if seconds else 0)
        self.note(
            f"{self._what}: {size_text(done)} of {size_text(self._total)}, {percent} %, {rate}"
        )

    def _end(self) -> None:
        """Finish a part that has had lines; of a short one, the result tells."""
        if self._told > self._started:
            self._tell()

    def __exit__(self, *_exc: object) -> None:
        self._end()


class _RateColumn(ProgressColumn):
    """The rate in the units of everything else; rich's own counts in thousands."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(rate_text(speed) if speed else "", style="progress.data.speed")


class Bar:
    """A bar with rate and remaining time."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            _RateColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console or Console(stderr=True),
            expand=True,
        )
        self._task: TaskID | None = None
        self._before = 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Show a new bar."""
        self._before = done
        self._task = self._progress.add_task(what, total=total, completed=done)

    def moved(self, count: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._before + count)

    def note(self, sentence: str) -> None:
        """Write a line above the bar."""
        self._progress.console.print(sentence, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _exc: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


def watcher(*, quiet: bool) -> Silent | Bar:
    """Return what fits where stderr goes."""
    if quiet or sys.stderr is None:  # closed before the start
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
