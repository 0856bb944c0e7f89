# SPDX-License-Identifier: Apache-2.0
"""flock(2) with a deadline: the kernel drops the lock with its holder, however that dies."""

import fcntl
import time
from collections.abc import Iterator

#: How often a lock that is held is tried again: soon at first, for most are held for microseconds.
_FIRST_STEP_SECONDS = 0.00005
STEP_SECONDS = 0.0005


def steps(longest: float = STEP_SECONDS) -> Iterator[float]:
    """Yield how long to sleep before each further try, in seconds, without end."""
    step = _FIRST_STEP_SECONDS
    while True:
        yield step
        step = min(2 * step, longest)


def try_flock(fd: int, operation: int = fcntl.LOCK_EX) -> bool:
    """Lock without waiting; False: another open file description has the lock."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_flock(fd: int, seconds: float, operation: int = fcntl.LOCK_EX) -> bool:
    """Lock, waiting at most so long; False: it was held all the time."""
    if try_flock(fd, operation):
        return True
    deadline = time.monotonic() + seconds
    for step in steps():
        if time.monotonic() >= deadline:
            break
        time.sleep(step)
        if try_flock(fd, operation):
            return True
    return False
