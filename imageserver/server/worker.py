# SPDX-License-Identifier: Apache-2.0
"""The worker process: a loop that waits, threads that serve, and an orderly end.

    listeners --accept--> [ loop: heads, idle connections, answers not taken, refused uploads ]
                                |  head complete
                   OPTIONS, HEAD|  everything else
                         v             v
                  [ probe threads ] [ transfer threads ]   each: serve(), then back to the loop
                         v
                  [ asking threads ]   where a back end has to be asked

Stopping: the listeners close at once; connections that were accepted are served to the end
of their request. An idle connection is kept open while other workers live on (a reload): its
next request is answered, with ``Connection: close``. The drain timeout bounds it all.
"""

import contextlib
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from typing import Any, ClassVar

from gunicorn import systemd
from gunicorn.workers.base import Worker

from imageserver.core.errors import ImageServerError
from imageserver.core.ports import Ticket
from imageserver.core.slots import Holder, Kind
from imageserver.core.workers import WorkerState
from imageserver.observability import logs
from imageserver.process import Process
from imageserver.server.accepting import Acceptors, AcceptPolicy
from imageserver.server.admin_listener import admin_application, admin_name, admit
from imageserver.server.control import ControlServer
from imageserver.server.loop import MOST_WAITING, Loop, Timeouts
from imageserver.server.pools import Pools
from imageserver.server.tls import server_context
from imageserver.settings import Settings

log = logging.getLogger(__name__)

#: gunicorn's name of this server's own application; other worker classes load it by this.
APPLICATION = "imageserver.process:create()"
#: How long a busier worker leaves a new connection to a less busy one, per request of difference.
_YIELD_SECONDS = 0.01
_MAX_YIELD_SECONDS = 0.05
#: ... and one that has just accepted another, to all others that are no busier.
_MOMENT_SECONDS = 0.001
#: How long an idle connection survives a stop when no other worker takes over.
_STOP_IDLE_SECONDS = 1.0
#: How long threads get to notice that their connections were cut, before the process ends.
_ABORT_SECONDS = 3.0
#: Between two heartbeats; the master waits a minute for one (``configuration``).
_NOTIFY_SECONDS = 1.0

#: Descriptors for all but transfers: listeners, pipes, the table, probes, control peers, and
#: connections to NBD servers that are kept (``backends/nbd/pool.py``).
_OWN_DESCRIPTORS = 192
#: ... for a transfer: its connection, directory, file, temporary file, lock, usage, event, socket.
_TRANSFER_DESCRIPTORS = 8
#: Connections that may wait however few descriptors there are.
_LEAST_WAITING = 16
#: What tells a worker to stop.
STOPPING = frozenset({signal.SIGTERM, signal.SIGQUIT, signal.SIGINT})


#: The master's, which the end of a terminal brings to every process: by default, it kills.
_MASTERS = frozenset({signal.SIGHUP, signal.SIGUSR2})


def is_draining(heartbeat: Any) -> bool:
    """Tell whether a worker drains, by its heartbeat file: for its master, which opens no table."""
    try:
        return os.fstat(heartbeat.fileno()).st_size > 0
    except (OSError, ValueError):  # closed
        return False


class ImageWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """A gunicorn worker for long transfers and frequent probes."""

    SIGNALS: ClassVar[list[signal.Signals]] = [
        number for number in Worker.SIGNALS if number not in _MASTERS
    ]
    #: What the master has read and made before the fork (``ImageArbiter.equip``).
    settings: Settings | None = None
    tls: ssl.SSLContext | None = None

    def init_process(self) -> None:
        """Set up what must belong to this process alone, then run the loop."""
        # Our master's hook may be missing: the same settings then, and never plain HTTP.
        settings = self.settings or Settings.from_environ(os.environ)
        self.tls = self.tls or server_context(settings)
        logs.configure(settings.log_level, settings.log_format)
        descriptors = _raise_file_limit()
        self.process = process = Process(settings)
        self._notified = 0.0
        self._is_quitting = False
        self._metrics = metrics = process.metrics
        metrics.begin()
        self._row = process.slots.claim(Kind.WORKER, Ticket("", "worker", "", ""))
        self._pools = Pools(settings.threads, settings.client_timeout, self._publish, metrics)
        timeouts = Timeouts(settings.client_timeout, settings.keepalive)
        self._loop = Loop(timeouts, self._pools.dispatch, metrics)
        self._acceptors = Acceptors(self._loop, self._accept_delay, metrics)
        self._loop.most_waiting = most_waiting(descriptors, settings.threads)
        self._control = ControlServer(process.administration, settings.client_timeout)
        super().init_process()

    def load_wsgi(self) -> None:
        """Serve this process's application, unless gunicorn was told to serve another one."""
        if getattr(self.app, "app_uri", None) == APPLICATION:
            self.wsgi = self.process.application
        else:
            super().load_wsgi()

    # Signals: flags only; set_wakeup_fd (base.init_signals) ends the wait.

    def catch_early_signals(self) -> None:
        """Handle the signals that come between the fork and ``init_signals``."""
        for number in STOPPING:
            signal.signal(number, self.handle_exit)
        for number in _MASTERS:
            signal.signal(number, signal.SIG_IGN)

    def handle_exit(self, _sig: int, _frame: Any) -> None:
        """SIGTERM: drain."""
        self.alive = False

    def handle_quit(self, _sig: int, _frame: Any) -> None:
        """SIGINT, SIGQUIT: stop now."""
        self.alive = False
        self._is_quitting = True

    def handle_abort(self, _sig: int, _frame: Any) -> None:
        """SIGABRT: the master ends a worker without a heartbeat."""
        os._exit(1)

    # Running

    def run(self) -> None:
        """Serve until told to stop or orphaned, then drain."""
        self._pools.start(self.wsgi, self.cfg, self._loop)
        self._loop.watch(self.PIPE[0], self._woken)
        for listener in self.sockets:
            self._listen(listener)
        self._watch_master()
        self._publish()
        if self.alive:
            log.info("worker %d accepts connections", self.pid)
        if self.alive and "GUNICORN_PID" in os.environ:  # an upgrade (SIGUSR2) has succeeded
            systemd.sd_notify(f"MAINPID={self.ppid}", self.log)
        while self.alive:
            self._step()
        self._drain()

    def _listen(self, listener: Any) -> None:
        is_unix = listener.FAMILY == socket.AF_UNIX
        settings = self.process.settings
        admin = admin_name(listener, settings.admin_bind)
        if listener.getsockname() == (settings.control_socket or None):
            self._control.listen(listener, self._loop)
        elif admin is not None:
            app = admin_application(self.process, full_ids=is_unix)
            self._pools.reserve(admin, app)
            self._acceptors.listen(listener, AcceptPolicy(spreads=False, admits=admit))
        else:
            self._acceptors.listen(listener, AcceptPolicy(None if is_unix else self.tls))

    def _woken(self) -> None:
        os.read(self.PIPE[0], 4096)

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._notified >= _NOTIFY_SECONDS:
            self._notified = now
            self.notify()
            self.process.slots.mend()
            self.process.runtime.watch()
        self._loop.step()
        self._metrics.flush_if_due()
        self.process.recent.flush_if_due()

    def _watch_master(self) -> None:
        """Drain when the master dies, or has died since the fork: its address must be free."""
        try:
            master = os.pidfd_open(self.ppid)
        except ProcessLookupError:
            self._orphaned()
            return
        if os.getppid() == self.ppid:
            self._loop.watch(master, lambda: self._orphaned(master))  # readable: pidfd_open(2)
        else:  # another process has its pid
            os.close(master)
            self._orphaned()

    def _orphaned(self, master: int | None = None) -> None:
        log.warning("master died; worker %d finishes what runs and ends", self.pid)
        if master is not None:
            self._loop.forget(master)
        self.alive = False

    def _publish(self) -> None:
        """Tell the other workers how busy this one is, and whether it accepts."""
        state = WorkerState.ACCEPTING if self.alive else WorkerState.DRAINING
        self._row.progress(self._pools.busy(), state.value)

    def _accept_delay(self, has_fresh: bool) -> float:  # noqa: FBT001
        """Return for how many seconds to leave a new connection to less busy workers.

        ``has_fresh``: this one has just accepted another, which does not make it busy yet.
        """
        accepting = WorkerState.ACCEPTING
        busy = [row.done for row in self._workers() if WorkerState.of(row) is accepting]
        excess = self._pools.busy() - min(busy, default=0)
        if excess == 0 and has_fresh and len(busy) > 1:
            return _MOMENT_SECONDS
        return min(max(0.0, excess * _YIELD_SECONDS), _MAX_YIELD_SECONDS)

    # Stopping

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(self.tmp.fileno(), 1)  # see is_draining; sets its time to the system's
            self.notify()
        self._acceptors.close()
        self._control.stop()
        self._pools.last = True
        self.process.drain()
        self._publish()
        began = succeeded = time.monotonic()
        # The pools first: what they hand back in between is then found in the loop.
        while not (self._pools.is_empty() and self._loop.is_empty() and self._control.is_empty()):
            now = time.monotonic()
            if self._is_quitting or now > began + self.process.settings.drain_timeout:
                self._abort()
            if now > began + _STOP_IDLE_SECONDS:
                self._control.close_silent()
            # A worker has no row yet while it is being forked.
            if self._has_successor():
                succeeded = now
            elif now > succeeded + _STOP_IDLE_SECONDS:
                self._loop.close_idle()
            self._step()
        self._metrics.flush()
        self.process.recent.flush()
        self._row.release()

    def _has_successor(self) -> bool:
        try:
            rows = self.process.slots.living(Kind.WORKER)
        except ImageServerError:  # no descriptor is free to ask who lives
            rows = self._workers()
        return any(WorkerState.of(row) is not WorkerState.DRAINING for row in rows)

    def _workers(self) -> list[Holder]:
        return self.process.slots.holders(Kind.WORKER)

    def _abort(self) -> None:
        """End within seconds, with everything given back that threads can give back."""
        if cut := self._pools.busy():
            why = (
                "it was told to stop at once" if self._is_quitting else "the drain timeout is over"
            )
            log.warning("worker %d ends, for %s; transfers cut: %d", self.pid, why, cut)
        self._loop.close_all()
        self._pools.abort(_ABORT_SECONDS)
        self._metrics.flush()
        self.process.recent.flush()
        self._row.release()
        sys.stderr.flush()
        os._exit(0)  # not through atexit, which would wait for the threads


def _raise_file_limit() -> int:
    """Raise the limit on descriptors as far as it goes; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def most_waiting(descriptors: int, threads: int) -> int:
    """Return how many connections may wait, so that transfers find descriptors."""
    if descriptors == resource.RLIM_INFINITY:
        return MOST_WAITING
    left = descriptors - _OWN_DESCRIPTORS - threads * _TRANSFER_DESCRIPTORS
    return max(_LEAST_WAITING, min(MOST_WAITING, left))
