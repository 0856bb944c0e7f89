# SPDX-License-Identifier: Apache-2.0
"""flock(2) with a deadline: the kernel drops the lock with its holder, however that dies."""

import fcntl
import time

#: How often a lock that is held is tried again.
STEP_SECONDS = 0.0005


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
    while time.monotonic() < deadline:
        time.sleep(STEP_SECONDS)
        if try_flock(fd, operation):
            return True
    return False
