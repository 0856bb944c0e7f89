# SPDX-License-Identifier: Apache-2.0
"""When a process runs out of descriptors or threads: descriptors in reserve, limited warnings."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable

#: Descriptors held back: with them, connections are accepted while transfers have all others.
_HELD_BACK = 4
#: At most one warning in so many seconds.
_SECONDS = 10.0


class Reserve:
    """Duplicated descriptors, closed when one is needed and none is free; for one thread."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def fill(self, fd: int) -> None:
        """Duplicate ``fd`` until the reserve is full, or no descriptor is free."""
        with contextlib.suppress(OSError):
            while len(self._held) < _HELD_BACK:
                self._held.append(os.dup(fd))

    def spend(self) -> bool:
        """Close one; False where none is left."""
        if not self._held:
            return False
        os.close(self._held.pop())
        return True


class LimitedWarnings:
    """At most one warning in ten seconds; the next one says how many were left out."""

    def __init__(self, log: logging.Logger, now: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._now = now
        self._lock = threading.Lock()
        self._last = -_SECONDS
        self._omitted = 0

    def warn(self, message: str, *arguments: object) -> None:
        """Log a warning, or count it."""
        now = self._now()
        with self._lock:
            if now - self._last < _SECONDS:
                self._omitted += 1
                return
            self._last, omitted, self._omitted = now, self._omitted, 0
        again = f" (and {omitted} times more since the last such line)" if omitted else ""
        self._log.warning(message + again, *arguments)
