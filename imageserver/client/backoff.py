# SPDX-License-Identifier: Apache-2.0
"""How long to wait before asking again: doubling from a tenth of a second, jittered, bounded.

Patience counts from the last progress of any connection, or from a connection's own first
failure since, whichever is later: a busy server that still moves bytes is not given up. A byte
now and then is no progress: ``pace.LEAST_RATE`` must have come on average since the last one.
The jitter spreads many clients of one server out. Who waits is told why, once until something
moves.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from imageserver.client.failures import Transient
from imageserver.client.pace import LEAST_RATE

_FIRST_SECONDS = 0.1
#: Longest wait between two tries, in seconds: a server that came back is noticed soon.
_LONGEST_SECONDS = 5.0

#: How long nothing has moved when it is told why, in seconds.
_TELL_SECONDS = 3.0

T = TypeVar("T")
_log = logging.getLogger(__name__)


def wait_seconds(failures: int, retry_after: float | None, chance: float) -> float:
    """Return the wait after so many failures in a row; ``chance`` in [0, 1) is the jitter.

    A server's Retry-After is the least that is waited, but no more than twice our longest.
    """
    grown = min(_FIRST_SECONDS * 2.0 ** min(failures - 1, 16), _LONGEST_SECONDS)
    jittered = grown * (0.5 + chance / 2)
    return max(jittered, min(retry_after or 0.0, 2 * _LONGEST_SECONDS))


@dataclass(slots=True)
class Failures:
    """One connection's failures since its last success."""

    count: int = 0
    since: float = 0.0


class Patience:
    """How much longer it is worth asking; shared by all connections of an operation."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._seconds, self._clock, self._chance = seconds, clock, chance
        self._moved = clock()
        self._bytes = 0
        self._told = False
        #: How often there was progress.
        self.steps = 0

    def progress(self) -> None:
        """Note that something is done."""
        self._moved, self._bytes = self._clock(), 0
        self._told = False
        self.steps += 1

    def moved(self, count: int) -> None:
        """Note that bytes moved: progress, if there have been enough since the last."""
        self._bytes += count
        if self._bytes >= LEAST_RATE * (self._clock() - self._moved):
            self.progress()

    def after(self, failures: Failures, error: Transient) -> float:
        """Count a failure; return how long to wait, in seconds.

        Raises:
            Transient: ``error``, once patience has ended.
        """
        now = self._clock()
        if not failures.count:
            failures.since = now
        failures.count += 1
        left = max(failures.since, self._moved) + self._seconds - now
        if left <= 0:
            raise error
        if not self._told and now - self._moved >= _TELL_SECONDS and left >= 1:
            self._told = True
            _log.warning("imagectl: %s; trying again for %.0f s", error, left)
        return min(wait_seconds(failures.count, error.wait, self._chance()), left)


def patiently(
    action: Callable[[], T],
    patience: Patience,
    helps: type[Transient] | tuple[type[Transient], ...] = Transient,
) -> T:
    """Do it until it succeeds or patience ends; only failures that ``helps`` names are waited for.

    Raises:
        Transient: the last failure.
    """
    failures = Failures()
    while True:
        try:
            done = action()
        except helps as exc:
            time.sleep(patience.after(failures, exc))
        else:
            patience.progress()
            return done
