# SPDX-License-Identifier: Apache-2.0
"""How far a transfer is: a bar on a terminal, elsewhere a line every few seconds.

Operations know ``Watcher`` only. All of this goes to stderr; stdout has the result.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Protocol, Self

from imageserver.client.showing.terminal import is_dumb
from imageserver.client.showing.units import plain_text, rate_text, size_text

#: How often a plain line is written, in seconds.
_LINE_SECONDS = 5.0


class Watcher(Protocol):
    """Is told by an operation, from one thread, how far it is."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A part of ``total`` bytes begins, of which ``done`` were moved by an earlier run."""

    def moved(self, count: int) -> None:
        """So many bytes were moved since ``begin``."""

    def note(self, sentence: str) -> None:
        """Something happened that the user should know."""


def adding(watch: Watcher) -> Callable[[int], None]:
    """Return a function that tells ``watch`` of more bytes, since its ``begin`` here."""
    count = 0

    def add(more: int) -> None:
        nonlocal count
        count += more
        watch.moved(count)

    return add


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
    """Writes a line every few seconds, and one at the end of a part that had any."""

    def __init__(self) -> None:
        self._what, self._total, self._before, self._count = "", 0, 0, 0
        self._started = self._told = time.monotonic()

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Begin a part; its first line comes after some seconds."""
        self._end()
        self._what, self._total, self._before, self._count = what, total, done, 0
        self._started = self._told = time.monotonic()

    def moved(self, count: int) -> None:
        """Write a line, if the last one is some seconds old."""
        self._count = count
        if time.monotonic() - self._told >= _LINE_SECONDS:
            self._tell()

    def note(self, sentence: str) -> None:
        """Write a sentence; an operation does not fail because stderr cannot be written."""
        with contextlib.suppress(OSError):
            print(plain_text(sentence), file=sys.stderr, flush=True)  # noqa: T201 - its output

    def _tell(self) -> None:
        self._told = time.monotonic()
        done, seconds = self._before + self._count, self._told - self._started
        percent = 100 * done // self._total if self._total else 100
        rate = rate_text(self._count / seconds if seconds else 0)
        self.note(
            f"{self._what}: {size_text(done)} of {size_text(self._total)}, {percent} %, {rate}"
        )

    def _end(self) -> None:
        """Write the last line of a part that has had any."""
        if self._told > self._started:
            self._tell()

    def __exit__(self, *_exc: object) -> None:
        self._end()


def watcher(*, quiet: bool) -> contextlib.AbstractContextManager[Watcher]:
    """Return the watcher that suits stderr."""
    if quiet or sys.stderr is None:  # closed before the start
        return Silent()
    if not sys.stderr.isatty() or is_dumb():
        return Lines()
    from imageserver.client.showing.progress_bar import ProgressBar  # noqa: PLC0415 - rich costs what the rest does

    return ProgressBar()
