# SPDX-License-Identifier: Apache-2.0
"""How long ago a file was changed, whatever has been done to the system's clock since.

A file system stamps files by the system's clock, which may be set. What differs is noted: since
when the system's clock has been ahead of the monotonic one by how much.

    monotonic clock     ----------+---------------------+-------------> now
    system's clock is   a ahead   .    b ahead          .    c ahead
                                  noticed here          ... and here

A stamp is a moment in each of these times; those count that lie in it. Where there are several,
for the clock was set back, the latest counts: nothing is older than it may be. Where there is
none, the stamp is of a time to come: age zero.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

#: The two clocks drift apart by less within a minute; stamps are up to a timer tick old.
_STEP_NS = 100_000_000
#: As many settings are remembered: for most machines there is none.
_MOST = 32
_EVER = -(1 << 63)


@dataclass(slots=True)
class _Time:
    """While the system's clock was ``ahead_ns`` ahead of the monotonic one."""

    ahead_ns: int
    first_ns: int
    last_ns: int


class FileAge:
    """Tells ages; one for all threads. Times are nanoseconds."""

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall_ns = wall_ns
        self._now_ns = now_ns
        self._lock = threading.Lock()
        now = now_ns()
        self._times = [_Time(wall_ns() - now, _EVER, now)]

    def age_ns(self, changed_ns: int) -> int:
        """Return how long ago a file was changed that is stamped ``changed_ns`` (Unix epoch)."""
        with self._lock:
            now = self._look()
            moments = [
                changed_ns - found.ahead_ns
                for found in self._times
                if found.first_ns - _STEP_NS
                <= changed_ns - found.ahead_ns
                <= found.last_ns + _STEP_NS
            ]
        return max(0, now - max(moments, default=now))

    def _look(self) -> int:
        """Note whether the system's clock has been set; return the time."""
        now = self._now_ns()
        ahead_ns = self._wall_ns() - now
        latest = self._times[-1]
        if abs(ahead_ns - latest.ahead_ns) > _STEP_NS:
            # Anywhen between the last look and now: both hold for that while.
            self._times.append(_Time(ahead_ns, latest.last_ns, now))
            latest.last_ns = now
            del self._times[:-_MOST]
            self._times[0].first_ns = _EVER
        else:
            latest.last_ns = now
        return now
