# SPDX-License-Identifier: Apache-2.0
"""Threads that are started when they are first needed, and kept; each does one task at a time.

The system may refuse another thread (a cgroup's pids.max, systemd's TasksMax, RLIMIT_NPROC).
``concurrent.futures`` raises then, but leaves the task in its queue, where a thread may take it
later: the caller cannot know whether it will run. Here a task that was refused never runs.
"""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from imageserver.server.shortage import LimitedWarnings

log = logging.getLogger(__name__)


class NoThread(Exception):
    """No thread is free, and no other one can be started."""


class Threads:
    """At most ``most`` threads; any thread may give them tasks, and never waits for one."""

    def __init__(self, name: str, most: int) -> None:
        self._name = name
        self._most = most
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._count = 0
        self._unfinished = 0
        #: The last thread that was wanted was not to be had.
        self.is_short = False
        self._warnings = LimitedWarnings(log)

    def start(self) -> None:
        """Start all threads now, or as many as the system allows."""
        with self._lock:
            while self._count < self._most and self._make():
                pass

    def submit(self, work: Callable[[], None], *, may_wait: bool) -> None:
        """Have a thread do a task.

        If ``most`` threads are busy, the task waits for one of them. If the system refuses another
        thread, the task waits only with ``may_wait``, and if there is any thread.

        Raises:
            NoThread: the task will not run.
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
            self.is_short = True
            return False
        self.is_short = False
        self._count += 1
        return True

    def _run(self) -> None:
        try:
            while True:
                self._work.get()()
                with self._lock:
                    self._unfinished -= 1
        finally:  # the task has raised, which is a defect: another thread will replace this one
            with self._lock:
                self._unfinished -= 1
                self._count -= 1
