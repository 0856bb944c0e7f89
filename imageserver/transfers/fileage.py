# SPDX-License-Identifier: Apache-2.0
"""How long ago a file was changed, whatever has been done to the system's clock since.

A file system stamps files by the system's clock, which may be set. So this module records by how
much the system's clock was ahead of the monotonic clock, from when to when.

    monotonic clock     ----------+---------------------+-------------> now
    system's clock is   a ahead   |    b ahead          |    c ahead
                                  set, noticed here     ... and here

In each of these periods a stamp means a moment of the monotonic clock, and is possible only if that
lies in the period. Of several possible ones (the clock was set back) the latest counts, so that no
file looks older than it is. If there is none, the stamp is in the future: age zero.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

#: The two clocks drift apart by less within a minute; stamps are up to a timer tick old.
_STEP_NS = 100_000_000
#: Most periods that are remembered; most machines have one.
_MOST = 32
_EVER = -(1 << 63)


@dataclass(slots=True)
class _Period:
    """While the system's clock was ``ahead_ns`` ahead of the monotonic one."""

    ahead_ns: int
    first_ns: int
    last_ns: int


class FileAge:
    """Tells ages, in nanoseconds. Thread-safe."""

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall_ns = wall_ns
        self._now_ns = now_ns
        self._lock = threading.Lock()
        now = now_ns()
        self._periods = [_Period(wall_ns() - now, _EVER, now)]

    def age_ns(self, changed_ns: int) -> int:
        """Return how long ago a file was changed that is stamped ``changed_ns`` (Unix epoch)."""
        with self._lock:
            now = self._look()
            moments = [
                changed_ns - found.ahead_ns
                for found in self._periods
                if found.first_ns - _STEP_NS
                <= changed_ns - found.ahead_ns
                <= found.last_ns + _STEP_NS
            ]
        return max(0, now - max(moments, default=now))

    def look(self) -> None:
        """Note whether the system's clock has been set. To be called now and then."""
        with self._lock:
            self._look()

    def _look(self) -> int:
        """Note whether the system's clock has been set; return the time."""
        now = self._now_ns()
        ahead_ns = self._wall_ns() - now
        latest = self._periods[-1]
        if abs(ahead_ns - latest.ahead_ns) > _STEP_NS:
            # It was set at some time since the last look: both periods have that time.
            self._periods.append(_Period(ahead_ns, latest.last_ns, now))
            latest.last_ns = now
            del self._periods[:-_MOST]
            self._periods[0].first_ns = _EVER
        else:
            latest.last_ns = now
        return now


@cache
def file_age() -> FileAge:
    """Return that of this process: in a worker, with the periods that its master has noted."""
    return FileAge()
