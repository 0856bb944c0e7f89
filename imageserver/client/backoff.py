# SPDX-License-Identifier: Apache-2.0
"""Retries: how long to wait before the next attempt, and when to give up.

    failures in a row      1     2     3     4    5    6 ...
    seconds to wait       0.1   0.2   0.4   0.8  1.6  3.2, then 5; half of it is random

A retry budget (``--patience``) counts from the last progress of any connection, or from the first
failure of this connection since its last success, whichever is later: a busy server that still
moves bytes is not given up. A few bytes are no progress: they must have come at
``pace.LEAST_RATE`` on average since the last progress. The random half spreads many clients of
one server out. A retry that takes long is logged, once until there is progress again.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from imageserver.client.failures import Broken, Busy, Transient
from imageserver.client.pace import LEAST_RATE

_FIRST_SECONDS = 0.1
#: Longest wait between two attempts, in seconds: a server that came back is noticed soon.
_LONGEST_SECONDS = 5.0
#: Without progress for so many seconds, the reason is logged.
_LOG_SECONDS = 3.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


def wait_seconds(failures: int, retry_after: float | None, chance: float) -> float:
    """Return the wait after so many failures in a row; ``chance`` in [0, 1) is the random part.

    A server's Retry-After is the shortest wait, up to twice our own longest one.
    """
    grown = min(_FIRST_SECONDS * 2.0 ** min(failures - 1, 16), _LONGEST_SECONDS)
    jittered = grown * (0.5 + chance / 2)
    return max(jittered, min(retry_after or 0.0, 2 * _LONGEST_SECONDS))


@dataclass(slots=True)
class FailureStreak:
    """One connection's failures since its last success."""

    count: int = 0
    since: float = 0.0


class RetryBudget:
    """How long an operation goes on retrying without progress; its connections share it."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._seconds, self._clock, self._chance = seconds, clock, chance
        self._moved = clock()
        self._bytes = 0
        self._is_logged = False
        #: How often there was progress.
        self.steps = 0

    def progress(self) -> None:
        """Note progress: the budget is full again."""
        self._moved, self._bytes = self._clock(), 0
        self._is_logged = False
        self.steps += 1

    def moved(self, count: int) -> None:
        """Note that bytes moved: enough of them since the last progress are progress."""
        self._bytes += count
        if self._bytes >= LEAST_RATE * (self._clock() - self._moved):
            self.progress()

    def after(self, streak: FailureStreak, error: Transient) -> float:
        """Count a failure; return how long to wait, in seconds.

        Raises:
            Transient: ``error``, once the budget is used up.
        """
        now = self._clock()
        if not streak.count:
            streak.since = now
        streak.count += 1
        left = max(streak.since, self._moved) + self._seconds - now
        if left <= 0:
            raise error
        if not self._is_logged and now - self._moved >= _LOG_SECONDS and left >= 1:
            self._is_logged = True
            _log.warning("imagectl: %s; trying again for %.0f s", error, left)
        return min(wait_seconds(streak.count, error.wait, self._chance()), left)


def retried(
    action: Callable[[], T],
    budget: RetryBudget,
    on: type[Transient] | tuple[type[Transient], ...] = Transient,
    wait: Callable[[float], object] = time.sleep,
) -> T:
    """Call ``action`` until it succeeds; only the failures in ``on`` are retried.

    ``wait`` waits for so many seconds, or until there is no use in that.

    Raises:
        Transient: the last failure, once the budget is used up.
    """
    streak = FailureStreak()
    while True:
        try:
            done = action()
        except on as exc:
            wait(budget.after(streak, exc))
        else:
            budget.progress()
            return done


def retried_while_busy(action: Callable[[], T], seconds: float) -> T:
    """Call ``action`` for a command that only looks: it does not wait for a server to start.

    A transfer of hours should survive a restart of its server; such a command should report it.

    Raises:
        Unreachable: there is no server.
        Transient: the last failure, after so many seconds.
    """
    return retried(action, RetryBudget(seconds), (Busy, Broken))


def retried_start(begin: Callable[[], Iterator[T]], seconds: float) -> Iterator[T]:
    """Return an iterator whose first item was waited for like ``retried_while_busy``."""

    def start() -> Iterator[T]:
        items = begin()
        return chain(list(islice(items, 1)), items)

    return retried_while_busy(start, seconds)
