# SPDX-License-Identifier: Apache-2.0
"""Busy polling: a thread that expects its answer at once looks for it again and again.

A core that goes idle takes 20 to 60 µs to come back, most in a virtual machine, which is as long as
a server needs for a small request. So a thread that expects its answer within ``_SPIN_SECONDS``
does not sleep, as in QEMU's event loop (``poll-max-ns``). It expects what the last waits on the
connection took. Between two looks it offers the core to others (sched_yield(2)).

For requests that are alone in their process (``link.py``): else there is other work for the core.
"""

import os
import time
from collections.abc import Callable

#: How long a thread looks without sleeping, at most; above, a wake-up is a small part of the wait.
_SPIN_SECONDS = 0.0002
#: How much one wait counts against those before.
_WEIGHT = 0.25
#: No wait counts for more, so that one does not stop the next hundred.
_MOST_SECONDS = 4 * _SPIN_SECONDS


class BusyPoll:
    """How one connection's threads wait for it, one at a time."""

    __slots__ = ("_expected",)

    def __init__(self) -> None:
        #: How many seconds a wait has taken lately.
        self._expected = 0.0

    def wait(self, poll: Callable[[int], int], milliseconds: int) -> None:
        """Wait until ``poll`` (nbd_poll(3)) has found something to do, at most so long.

        Raises:
            nbd.Error: whatever ``poll`` raises.
        """
        began = time.monotonic()
        if self._expected > _SPIN_SECONDS or not _finds(poll, began + _SPIN_SECONDS):
            poll(milliseconds)
        took = min(time.monotonic() - began, _MOST_SECONDS)
        self._expected += _WEIGHT * (took - self._expected)


def _finds(poll: Callable[[int], int], until: float) -> bool:
    """Look until there is something, or it has taken too long."""
    while time.monotonic() < until:
        if poll(0):
            return True
        os.sched_yield()
    return False
