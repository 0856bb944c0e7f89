# SPDX-License-Identifier: Apache-2.0
"""How long to wait before asking again: doubling from a tenth of a second, jittered, bounded.

Patience is counted from the last progress: any byte that moved makes it whole again. The
waits grow with the failures since then, so that many clients of a busy server spread out.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from imageserver.client.errors import Transient

_FIRST_SECONDS = 0.1
#: Longest wait between two tries, in seconds: a server that came back is noticed soon.
_LONGEST_SECONDS = 5.0

T = TypeVar("T")


def wait_seconds(failures: int, retry_after: float | None, chance: float) -> float:
    """Return the wait after so many failures in a row; ``chance`` in [0, 1) is the jitter.

    A server's Retry-After is the least that is waited, as far as our longest wait goes twice.
    """
    grown = min(_FIRST_SECONDS * 2.0 ** min(failures - 1, 16), _LONGEST_SECONDS)
    jittered = grown * (0.5 + chance / 2)
    return max(jittered, min(retry_after or 0.0, 2 * _LONGEST_SECONDS))


class Patience:
    """How much longer one thread goes on asking; not shared between threads."""

    def __init__(
        self,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._seconds, self._clock, self._chance = seconds, clock, chance
        self._failures = 0
        self._since: float | None = None

    def progress(self) -> None:
        """Note that something moved."""
        self._failures = 0
        self._since = None

    def after(self, error: Transient) -> float:
        """Return how long to wait after a failure, in seconds.

        Raises:
            Transient: ``error``, once patience has ended.
        """
        now = self._clock()
        if self._since is None:
            self._since = now
        self._failures += 1
        left = self._since + self._seconds - now
        if left <= 0:
            raise error
        return min(wait_seconds(self._failures, error.wait, self._chance()), left)


def patiently(
    action: Callable[[], T], patience: Patience, stop: threading.Event | None = None
) -> T:
    """Do it until it succeeds or patience ends; ``stop`` cuts a wait short.

    Raises:
        Transient: the last failure.
    """
    waiter = stop or threading.Event()
    while True:
        try:
            done = action()
        except Transient as exc:
            wait = patience.after(exc)
            if waiter.wait(wait):
                raise
        else:
            patience.progress()
            return done
