# SPDX-License-Identifier: Apache-2.0
"""Threads that are made when they are first needed, and kept; each does one work at a time.

The system may refuse another thread (a cgroup's pids.max, systemd's TasksMax, RLIMIT_NPROC).
``concurrent.futures`` raises then, but keeps the work in its queue, where a thread may find it
later: nobody knows whether it is done. Here work that was refused is never done.
"""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from imageserver.server.shortage import LimitedWarnings

log = logging.getLogger(__name__)


class NoThread(Exception):
    """No thread is free, and another one is not to be had."""


class Threads:
    """At most ``most`` threads; any thread may give them work, and never waits for it."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._count = 0
        self._unfinished = 0
        self._warnings = LimitedWarnings(log)

    def start(self) -> None:
        """Make all threads now, as far as they are to be had."""
        with self._lock:
            while self._count < self._most and self._make():
                pass

    def submit(self, work: Callable[[], None], *, may_wait: bool) -> None:
        """Have a thread do the work.

        Where all threads there may be have work, it waits for one of them; where another
        thread is not to be had, only if it ``may_wait``.

        Raises:
            NoThread: it will not be done.
        """
        with self._lock:
            has_thread = self._unfinished < self._count or self._count == self._most or self._make()
            if not has_thread and not (may_wait and self._count):
                raise NoThread(self._name)
            self._unfinished += 1
        self._work.put(work)

    def _make(self) -> bool:
        name = f"{self._name}_{self._count}"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError as exc:
            self._warnings.warn("there is no thread for another %s: %s", self._name, exc)
            return False
        self._count += 1
        return True

    def _run(self) -> None:
        try:
            while True:
                self._work.get()()
                with self._lock:
                    self._unfinished -= 1
        finally:  # the work has failed, which is a defect: another thread comes for this one
            with self._lock:
                self._unfinished -= 1
                self._count -= 1
