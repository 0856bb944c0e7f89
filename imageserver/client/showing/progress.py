# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a running transfer: a bar on a terminal, a line now and then elsewhere.

Operations know ``Watcher`` only. All of it goes to stderr; stdout has the result.
"""

import contextlib
import sys
import time
from typing import Protocol, Self

from imageserver.client.showing.terminal import is_dumb
from imageserver.client.showing.units import plain_text, rate_text, size_text

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
        """Finish a part that has had lines; of a short one, the result tells."""
        if self._told > self._started:
            self._tell()

    def __exit__(self, *_exc: object) -> None:
        self._end()


def watcher(*, quiet: bool) -> contextlib.AbstractContextManager[Watcher]:
    """Return what fits where stderr goes."""
    if quiet or sys.stderr is None:  # closed before the start
        return Silent()
    if not sys.stderr.isatty() or is_dumb():
        return Lines()
    from imageserver.client.showing.progress_bar import ProgressBar  # noqa: PLC0415 - rich costs what the rest does

    return ProgressBar()
