# SPDX-License-Identifier: Apache-2.0
"""What gunicorn's master does otherwise here: it goes on, whatever begins and fails.

gunicorn's own ends, and stops all workers, at any exception: a process that cannot be forked, a
configuration that cannot be read, a new worker that cannot boot. ``adapt`` puts functions in the
place of its methods.
"""

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

from gunicorn.errors import HaltServer

from imageserver.core.errors import StateUnavailable
from imageserver.core.slots import IncompatibleTable, Kind, WorkerState
from imageserver.runtime.directory import RuntimeDirectory, runtime_in
from imageserver.runtime.slottable import SharedTable
from imageserver.server.preconditions import CannotStart, check_reload
from imageserver.settings import InvalidSetting, Settings

log = logging.getLogger(__name__)

#: Between two new workers, so that those which die at once do not keep the machine busy.
_SPAWN_SECONDS = 0.05
#: After one that could not begin; the master's loop wakes up every second.
_PAUSE_SECONDS = 0.9


def adapt(arbiter: Any, settings: Settings, child_exit: Callable[[], None]) -> None:
    """Change a master that starts; ``child_exit`` is called for workers that could not boot."""
    runtime = runtime_in(settings.runtime_dir)
    _reload_without_waiting(arbiter)
    _replace_before_the_drained_end(arbiter)
    _try_again_to_spawn(arbiter)
    _survive_upgrades(arbiter, runtime)
    _survive_boot_errors(arbiter, SharedTable(runtime, settings.slot_limits), child_exit)
    _stop_with_abstract_sockets(arbiter)


def _reload_without_waiting(arbiter: Any) -> None:
    """Reload only what can start, and keep the master responsive meanwhile.

    gunicorn's ``reload`` waits for the old workers up to the graceful timeout, deaf to
    signals and to dying new workers. Ours drain for as long as a transfer takes and do not
    mind a second SIGTERM, which is what that wait is there to prevent. Before that it reads
    gunicorn.conf.py, and ends the process where that fails; nobody has been stopped by then.
    """
    reload = arbiter.reload
    master = os.getpid()

    def checked_reload() -> None:
        before = arbiter.cfg
        graceful_timeout = before.graceful_timeout
        try:
            check_reload(Settings.from_environ(os.environ))
            reload()
        except (CannotStart, InvalidSetting) as exc:
            log.error("reload refused, the workers go on: %s", exc)  # noqa: TRY400
        except (Exception, SystemExit):
            if os.getpid() != master:
                raise  # a new worker that ends
            arbiter.app.cfg = arbiter.cfg
            log.exception("reload failed, the workers go on")
        finally:
            arbiter.cfg.set("graceful_timeout", graceful_timeout)

    arbiter.reload = checked_reload


def _replace_before_the_drained_end(arbiter: Any) -> None:
    """Keep as many workers as the settings say, apart from those that were told to stop.

    gunicorn counts them until they end. While old ones drain, which may take an hour, it
    would replace none of those that die, and leave the port to nobody. They stay among
    ``WORKERS``: gunicorn goes on watching, reaping and, on stop, awaiting them.
    """
    kill_worker = arbiter.kill_worker
    arbiter.paused_until = 0.0

    def note_and_kill(pid: int, number: int) -> None:
        if number == signal.SIGTERM and pid in arbiter.WORKERS:
            arbiter.WORKERS[pid].is_told_to_stop = True
        kill_worker(pid, number)

    def manage_workers() -> None:
        workers = arbiter.WORKERS.values()
        staying = [worker for worker in workers if not hasattr(worker, "is_told_to_stop")]
        staying.sort(key=lambda worker: worker.age)
        for worker in staying[: max(0, len(staying) - arbiter.num_workers)]:
            arbiter.kill_worker(worker.pid, signal.SIGTERM)
        for _ in range(arbiter.num_workers - len(staying)):
            if time.monotonic() < arbiter.paused_until:
                break
            arbiter.spawn_worker()
            time.sleep(_SPAWN_SECONDS)

    arbiter.kill_worker = note_and_kill
    arbiter.manage_workers = manage_workers


def _try_again_to_spawn(arbiter: Any) -> None:
    """Wait for a better time where no process, descriptor or heartbeat file is to be had."""
    spawn_worker = arbiter.spawn_worker

    def spawn_or_try_later() -> Any:
        try:
            return spawn_worker()
        except (OSError, RuntimeError) as exc:  # none of a worker's own: those end it
            log.error("no worker could be started, trying again: %s", exc)  # noqa: TRY400
            arbiter.paused_until = time.monotonic() + _PAUSE_SECONDS
            return None

    arbiter.spawn_worker = spawn_or_try_later


def _survive_upgrades(arbiter: Any, runtime: RuntimeDirectory) -> None:
    """Begin no upgrade (SIGUSR2) that would have locks and slots elsewhere; survive a failed one.

    What fails between fork and exec would end in the main loop's last handler, in the copy of the
    master that was to become the new one: it stops the old one's workers.
    """
    reexec = arbiter.reexec
    master = os.getpid()

    def upgrade() -> None:
        problem = runtime.problem()
        if problem:
            log.error("upgrade refused: IMAGESERVER_RUNTIME_DIR: %s; restart the server", problem)
            return
        try:
            reexec()
        except Exception:
            log.exception("upgrade failed, the server goes on")
            if os.getpid() != master:
                os._exit(1)

    arbiter.reexec = upgrade


def _survive_boot_errors(arbiter: Any, table: SharedTable, child_exit: Callable[[], None]) -> None:
    """Go on with the others where a worker could not boot, and have it replaced as any other."""
    reap_workers = arbiter.reap_workers

    def reap_and_go_on() -> None:
        while True:
            try:
                reap_workers()
            except HaltServer as exc:
                if not _has_accepting(arbiter, table):
                    raise
                log.error("%s The others go on", exc.reason)  # noqa: TRY400
                arbiter.paused_until = time.monotonic() + _PAUSE_SECONDS
                child_exit()
            else:
                return

    arbiter.reap_workers = reap_and_go_on


def _has_accepting(arbiter: Any, table: SharedTable) -> bool:
    """Tell whether a worker of this master accepts connections."""
    try:
        with contextlib.closing(table):  # again at its next use; see hooks._sweep
            rows = table.living(Kind.WORKER)
    except (StateUnavailable, IncompatibleTable, OSError, ValueError):
        return False
    accepting = WorkerState.ACCEPTING
    return any(row.owner.pid in arbiter.WORKERS for row in rows if WorkerState.of(row) is accepting)


def _stop_with_abstract_sockets(arbiter: Any) -> None:
    """Close abstract sockets (unix(7)) first: gunicorn would unlink them as files, and fail."""
    stop = arbiter.stop

    def stop_abstract_first(graceful: bool = True) -> None:  # noqa: FBT001, FBT002 - gunicorn's
        for listener in list(arbiter.LISTENERS):
            if isinstance(listener.getsockname(), bytes):
                arbiter.LISTENERS.remove(listener)
                listener.close()
        stop(graceful)

    arbiter.stop = stop_abstract_first
