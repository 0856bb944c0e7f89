# SPDX-License-Identifier: Apache-2.0
"""The master: gunicorn's arbiter, made to survive a fork, a reload or an upgrade that fails.

gunicorn's arbiter ends at any exception, and its workers with it: a process that cannot be forked,
a configuration that cannot be read, a new worker that cannot boot. It also waits in ``reload`` for
the old workers, counts the ones that drain, and does not support abstract sockets.
``ImageArbiter`` overrides the methods that do so; ``configuration`` makes its last methods
gunicorn's hooks. None of them raises once the server serves.
"""

import contextlib
import logging
import os
import signal
import ssl
import time
from collections.abc import Mapping
from dataclasses import replace
from queue import Empty
from types import MappingProxyType
from typing import Any

from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from imageserver.core import entry
from imageserver.core.errors import StateUnavailable
from imageserver.core.slots import IncompatibleTable, Kind
from imageserver.core.workers import WorkerState
from imageserver.observability import logs
from imageserver.process import Process
from imageserver.server import activation, addresses, admin_listener, startup
from imageserver.server.activation import WrongSockets
from imageserver.server.admin_listener import admin_name, bindable
from imageserver.server.control import allow_group
from imageserver.server.preconditions import CannotStart, check, check_reload, tls_context
from imageserver.server.worker import STOPPING, ImageWorker, is_draining
from imageserver.settings import Settings, variable_of
from imageserver.transfers.fileage import file_age

log = logging.getLogger(__name__)

#: Between two forks: workers that die at once must not keep the machine busy.
_SPAWN_SECONDS = 0.05
#: After a worker that could not start; the master's loop wakes up every second.
_PAUSE_SECONDS = 0.9
#: How long workers may take to end at once: what they hold is given back in two of these.
_QUICK_SECONDS, _STEP_SECONDS = 5.0, 0.1
#: A master that looks after its workers this late was stopped, or the host was: so were they.
_GAP_SECONDS, _THAW_SECONDS = 20.0, 10.0


class ImageArbiter(Arbiter):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's master for this server.

    The ``gunicorn`` command makes an ``Arbiter`` and leaves no choice, so ``on_starting`` gives
    that object this class. Therefore there is no constructor: ``begin`` sets everything.
    """

    settings: Settings
    process: Process
    tls: ssl.SSLContext | None
    #: No worker is forked before this time (monotonic clock).
    _paused_until = 0.0
    _was_told_to_end = False
    #: When the heartbeats of workers were looked at last, and from when on they count again.
    _looked_at = _spared_until = 0.0
    #: The files of our Unix sockets, by path.
    _sockets: Mapping[str, os.stat_result] = MappingProxyType({})
    #: Addresses of the configuration that must not be bound.
    _unbound: frozenset[str] = frozenset()

    @staticmethod
    def adopt(arbiter: Arbiter, settings: Settings) -> None:
        """Make a gunicorn master that starts one of ours; it has bound and forked nothing yet."""
        arbiter.__class__ = ImageArbiter
        arbiter.begin(settings)

    def begin(self, settings: Settings) -> None:
        """Check, and clean up after predecessors; or end the process with a sentence."""
        logs.configure(settings.log_level, settings.log_format)
        startup.set_umask()
        self._looked_at = time.monotonic()
        try:
            warnings = check(settings)
            self.tls = tls_context(settings)
            applied = self._applied(settings)
            if activation.is_activated():
                activation.check(self.cfg.address)
        except WrongSockets as exc:
            raise SystemExit(f"imageserver: {exc}.") from exc
        except CannotStart as exc:
            raise SystemExit(f"imageserver: {exc}") from exc
        for warning in warnings:
            log.warning("%s", warning)
        startup.require_free_addresses(applied)
        self.settings, self.process = settings, Process(settings)
        startup.take_over(self.process)
        log.info("settings in force", extra=entry.fields(**startup.in_force(applied)))

    def _applied(self, settings: Settings) -> Settings:
        """Return the settings without those that the worker class does not apply.

        Only ``ImageWorker`` distinguishes listeners. Another class would serve images at the admin
        addresses, so they are left unbound, now and after each reload (``setup``).
        """
        if issubclass(self.worker_class, ImageWorker):
            return settings
        for name in ("tls_cert", "control_socket"):
            if getattr(settings, name):
                raise CannotStart(
                    f"{variable_of(name)} is set, but only the worker class of gunicorn.conf.py "
                    "heeds it: leave the class as it is."
                )
        self._unbound = frozenset(bindable(address) for address in settings.admin_bind)
        self._leave_unbound()
        return replace(settings, admin_bind=())

    def _leave_unbound(self) -> None:
        self.cfg.set("bind", [bound for bound in self.cfg.bind if bound not in self._unbound])

    def setup(self, app: Any) -> None:
        """Take over a configuration: at the start, and in each reload."""
        super().setup(app)
        if self._unbound:
            self._leave_unbound()

    # Workers

    def spawn_worker(self) -> Any:
        """Fork a worker; later, if the system has no process, descriptor or heartbeat file.

        Python forgets a signal that a child gets before its first instruction, and until
        ``equip`` it has the master's handlers. So what tells it to stop is blocked until then.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            return super().spawn_worker()
        except (OSError, RuntimeError) as exc:  # not a worker's own, which end it
            log.error("no worker could be started, trying again: %s", exc)  # noqa: TRY400
            self._pause()
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def _pause(self) -> None:
        self._paused_until = time.monotonic() + _PAUSE_SECONDS

    def kill_worker(self, pid: int, sig: int) -> None:
        """Send a worker a signal, and remember who was told to stop: see ``manage_workers``."""
        if sig == signal.SIGTERM and pid in self.WORKERS:
            self.WORKERS[pid].is_told_to_stop = True
        super().kill_worker(pid, sig)

    def manage_workers(self) -> None:
        """Keep as many workers as the settings say, apart from those that were told to stop.

        gunicorn counts those until they end. While they drain, which may take an hour, it would
        replace no new worker that dies, and at last no worker would accept. They stay among
        ``WORKERS``: gunicorn goes on to watch and reap them and, on stop, to wait for them.

        gunicorn calls this once a second. So it also claims the runtime directory's path, once
        the server that had it before (an upgrade, orphans) has ended, and notes whether the
        system's clock was set. New workers inherit both.
        """
        self.process.runtime.claim.take()
        file_age().look()
        workers = self.WORKERS.values()
        staying = [
            worker
            for worker in workers
            if not (hasattr(worker, "is_told_to_stop") or is_draining(worker.tmp))
        ]
        staying.sort(key=lambda worker: worker.age)
        for worker in staying[: max(0, len(staying) - self.num_workers)]:
            self.kill_worker(worker.pid, signal.SIGTERM)
        for _ in range(self.num_workers - len(staying)):
            if time.monotonic() < self._paused_until:
                break
            self.spawn_worker()
            time.sleep(_SPAWN_SECONDS)

    def murder_workers(self) -> None:
        """End workers that show no life; not all of them, where the whole host stood still."""
        now, before = time.monotonic(), self._looked_at
        self._looked_at = now
        if now - before > _GAP_SECONDS:
            log.warning("everything stood still for %.0f s; no worker is ended", now - before)
            self._spared_until = now + _THAW_SECONDS
        if now >= self._spared_until:
            super().murder_workers()

    def reap_workers(self) -> None:
        """Reap dead workers; one that could not boot ends a server that has replaced none yet."""
        while True:
            try:
                super().reap_workers()
            except HaltServer as exc:
                if self.worker_age <= self.num_workers and not self._has_accepting():
                    raise
                log.error("%s Trying again", exc.reason)  # noqa: TRY400
                self._pause()
                self.free_slots(None)
            else:
                return

    def _has_accepting(self) -> bool:
        """Tell whether a worker of this master accepts connections."""
        slots = self.process.slots
        try:
            with contextlib.closing(slots):  # mapped again at its next use: see startup.sweep
                rows = slots.living(Kind.WORKER)
        except (StateUnavailable, IncompatibleTable, OSError, ValueError):
            return False
        ready = [row for row in rows if WorkerState.of(row) is WorkerState.ACCEPTING]
        return any(row.owner.pid in self.WORKERS for row in ready)

    # A reload, an upgrade, the end

    def reload(self) -> None:
        """Replace the workers, if new ones can start, without waiting for the old ones.

        gunicorn waits up to the graceful timeout, so that old workers get one signal to stop and
        no second one; meanwhile it handles neither signals nor the death of new workers. Our
        workers drain for as long as a transfer takes, and a second signal changes nothing. Before
        that gunicorn reads gunicorn.conf.py, and ends the process if that fails; no worker has
        been stopped yet then.
        """
        before = self.cfg
        graceful_timeout = before.graceful_timeout
        try:
            check_reload(self.process)
            super().reload()
        except CannotStart as exc:
            log.error("reload refused, the workers go on: %s", exc)  # noqa: TRY400
        except (Exception, SystemExit):
            if os.getpid() != self.pid:
                raise  # a new worker that ends
            self.app.cfg = self.cfg
            log.exception("reload failed, the workers go on")
        finally:
            self.cfg.set("graceful_timeout", graceful_timeout)

    def reexec(self) -> None:
        """Refuse an upgrade to another runtime directory; survive an upgrade that fails.

        An exception between fork and exec would reach the last handler of the main loop in the
        child, and that handler would stop the workers of the old master.
        """
        problem = self.process.runtime.problem()
        if problem:
            log.error("upgrade refused: IMAGESERVER_RUNTIME_DIR: %s; restart the server", problem)
            return
        try:
            super().reexec()
        except Exception:
            log.exception("upgrade failed, the server goes on")
            if os.getpid() != self.pid:
                os._exit(1)

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        """End the server: on a signal (``exit_status`` 0), or for want of workers that boot."""
        self._was_told_to_end = exit_status == 0
        super().halt(reason, exit_status)

    def stop(self, graceful: bool = True) -> None:  # noqa: FBT001, FBT002 - gunicorn's signature
        """Stop. gunicorn's own goes by the system's clock, and fails if a socket's file is gone."""
        while self.LISTENERS:
            self.LISTENERS.pop().close()
        if self.reexec_pid == self.master_pid == 0 and not self.systemd:
            addresses.remove_files(self._sockets)
            self._sockets = {}  # SIGINT stops twice, and a successor may come in between
        self.kill_workers(signal.SIGTERM if graceful else signal.SIGQUIT)
        deadline = time.monotonic() + (self.cfg.graceful_timeout if graceful else _QUICK_SECONDS)
        while self.WORKERS and time.monotonic() < deadline:
            if graceful and self._is_hurried():
                graceful = False
                self.kill_workers(signal.SIGQUIT)
                deadline = time.monotonic() + _QUICK_SECONDS
            self._reap()
            time.sleep(_STEP_SECONDS)
        self.kill_workers(signal.SIGKILL)
        self._reap()
        is_last = self.reexec_pid == self.master_pid == 0  # no upgrade is under way
        if self._was_told_to_end and is_last and not self.settings.keep_registrations:
            startup.forget_registrations(self.process)

    def _is_hurried(self) -> bool:
        """Tell whether a signal has come that ends the server at once."""
        with contextlib.suppress(Empty):
            return self.SIG_QUEUE.get_nowait() in {signal.SIGINT, signal.SIGQUIT}
        return False

    def _reap(self) -> None:
        with contextlib.suppress(HaltServer):  # a worker that could not boot is no news any more
            self.reap_workers()

    # gunicorn's hooks

    def set_socket_modes(self) -> None:
        """``when_ready``: all addresses are bound, no worker is forked yet."""
        self._sockets = addresses.files_of(self.LISTENERS)
        try:
            # systemd's sockets have the modes that imageserver.socket says.
            if self.settings.control_socket in self._sockets and not self.systemd:
                allow_group(self.settings.control_socket)
            for address in self.settings.admin_bind:
                if not any(admin_name(listener, (address,)) for listener in self.LISTENERS):
                    # Sockets came from a server without it, or the worker class is another.
                    log.warning("nothing listens at IMAGESERVER_ADMIN_BIND=%s", address)
                elif not self.systemd and address.removeprefix("unix:") in self._sockets:
                    admin_listener.restrict(address)
        except OSError as exc:
            raise SystemExit(f"imageserver: {exc.filename}: {exc.strerror}.") from exc

    def equip(self, worker: Any) -> None:
        """``post_fork``: in a new worker, before anything else."""
        if isinstance(worker, ImageWorker):  # else gunicorn was told to use another class
            worker.catch_early_signals()
            worker.settings, worker.tls = self.settings, self.tls
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def renew(self) -> None:
        """``on_reload``: the configuration was read again, no worker is forked yet."""
        self.cfg.set("graceful_timeout", 0)  # see reload
        try:
            self.tls = tls_context(self.settings)
        except CannotStart as exc:
            log.error("%s New connections get the certificate as it was", exc)  # noqa: TRY400

    def free_slots(self, _worker: object) -> None:
        """``child_exit``: free a worker's slots at once; a claim that finds none free does, too."""
        try:
            startup.sweep(self.process)
        except Exception:  # an exception here would stop the master
            log.exception("sweep after a worker's exit failed")

    def run_command_again(self) -> None:
        """``pre_exec``: in an upgrade, before exec: resolve the path of the command anew.

        scripts/install reaches releases through a link, which may lead to a newer one by now.
        """
        command = self.START_CTX["args"][1:]  # without the interpreter, which is the old release's
        home = os.path.dirname(os.path.dirname(command[0]))
        if os.path.isabs(home) and os.path.isfile(os.path.join(home, "gunicorn.conf.py")):
            self.START_CTX.update({0: command[0], "args": command, "cwd": home})
        if self.systemd:
            activation.pass_on(self.LISTENERS)
