# SPDX-License-Identifier: Apache-2.0
"""The guard of a shared file: one holder at a time over all threads of all processes.

flock(2) on this process's own descriptor, which the kernel drops with its holder, plus a thread
lock within the process. It is held for microseconds. Only a process stopped inside it makes
threads wait, and all fail at the same time: the patience counts from when the first one found it
held, so that a thread's wait never depends on how many wait before it.

    thread 1 finds    thread 2      thread 3        patience is over: all three fail
    it held           comes         comes
    |-----------------|-------------|---------------|
                                                    a thread that comes later waits a moment only
"""

import contextlib
import fcntl
import threading
import time
from collections.abc import Callable, Iterator

from imageserver.core.errors import StateUnavailable
from imageserver.runtime.flock import steps, try_flock
from imageserver.runtime.private import close_fd, open_private, own_files, unusable

#: That moment: a guard that works again is still held now and then, its holder waiting for a core.
_GRACE_SECONDS = 0.05
#: How often the kernel is asked to unlock it.
_UNLOCKS = 3


class Guard:
    """The guard on an open file, for one process's threads; ``what`` names the file."""

    def __init__(
        self,
        fd: int,
        what: str,
        patience: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fd = fd
        self._what = what
        self._patience = patience
        self._now = now
        self._sleep = sleep
        self._threads = threading.Lock()
        #: When another process was first seen to hold it, and last. Changed under the thread lock.
        self._held: tuple[float, float] | None = None

    @contextlib.contextmanager
    def hold(self, seconds: float | None = None) -> Iterator[None]:
        """Hold the guard; wait for it no longer than ``seconds``, by default its patience.

        Raises:
            StateUnavailable: another process holds it for longer.
        """
        self.acquire(seconds)
        try:
            yield
        finally:
            self.release()

    def acquire(self, seconds: float | None = None) -> None:
        """Take the guard: see ``hold``. The caller releases it, whatever happens."""
        if self._held is None and self._threads.acquire(blocking=False):
            deadline = None  # nobody has waited lately: mostly there is nothing to wait for
        else:
            began = self._now()
            deadline = self._deadline(began, seconds)
            if not self._threads.acquire(timeout=deadline - began):
                raise self._stuck()
        try:
            if not self._is_free():
                self._await(deadline or self._deadline(self._now(), seconds))
            self._held = None
        except BaseException:
            self._threads.release()
            raise

    def release(self) -> None:
        """Let go of the guard. Never fails: what was done under it is done.

        Where the kernel fails to unlock (a file system of another machine), it is asked again: as
        long as the guard is locked, other processes wait for it, and this one does not.
        """
        for _ in range(_UNLOCKS):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            except OSError:
                continue
            break
        self._threads.release()

    def _deadline(self, began: float, patience: float | None) -> float:
        seconds = self._patience if patience is None else patience
        held = self._held
        if held is None or began - held[1] > self._patience:
            return began + seconds
        return min(began + seconds, max(held[0] + self._patience, began + _GRACE_SECONDS))

    def _await(self, deadline: float) -> None:
        """Wait for who was found to hold it."""
        for step in steps():
            now = self._now()
            held = self._held
            is_new = held is None or now - held[1] > self._patience
            self._held = now if held is None or is_new else held[0], now
            if now >= deadline:
                raise self._stuck()
            self._sleep(step)
            if self._is_free():
                return

    def _is_free(self) -> bool:
        try:
            return try_flock(self._fd)
        except OSError as exc:
            raise unusable(self._what, exc) from exc

    def _stuck(self) -> StateUnavailable:
        return StateUnavailable(f"{self._what} cannot be used now: another process holds its guard")


@contextlib.contextmanager
def guarded(directory: str, name: str, what: str, patience: float) -> Iterator[None]:
    """Hold the guard of what ``name``, a file in ``directory`` made for this, stands for.

    Raises:
        StateUnavailable: another process holds it for longer than ``patience``, in seconds.
    """
    with own_files(what):
        fd = open_private(directory, name)
    try:
        with Guard(fd, what, patience).hold():
            yield
    finally:
        close_fd(fd)
