# SPDX-License-Identifier: Apache-2.0
"""gunicorn's hooks as plain functions, and the checks that let a server start or stop it.

``gunicorn.conf.py`` names them; nothing there has logic of its own.
"""

import logging
import os
import signal
import ssl
import time
from dataclasses import fields, replace
from typing import Any

from imageserver import journal, logs
from imageserver.locks import ImageLocks
from imageserver.metrics.counted import LateMetrics, metrics_in
from imageserver.metrics.numbers import clear_if_alone
from imageserver.private import UnusableDirectory, prepare_directory
from imageserver.processes import is_leaving
from imageserver.records import records
from imageserver.registry import Registry, UntrustedDirectory
from imageserver.server import activation, addresses
from imageserver.server.addresses import UnusableAddress
from imageserver.server.admin import admin_name, bindable, close_to_others
from imageserver.server.control import open_to_group
from imageserver.server.tls import UnusableFiles, server_context
from imageserver.server.worker import ImageWorker
from imageserver.settings import InvalidSetting, Settings, variable_of
from imageserver.shared import SharedTable
from imageserver.slots import IncompatibleTable

log = logging.getLogger(__name__)

#: Between two new workers, so that those which die at once do not keep the machine busy.
_SPAWN_SECONDS = 0.05


class CannotStart(Exception):
    """The server must not start; ``str()`` is one sentence that says what to do."""


def load_settings() -> Settings:
    """Read the settings, or end the process with a sentence."""
    try:
        return Settings.from_environ(os.environ)
    except InvalidSetting as exc:
        raise SystemExit(f"imageserver: {exc}") from exc


def check(settings: Settings) -> list[str]:
    """Prove that the server can work with these settings; return warnings.

    Raises:
        CannotStart: it cannot.
    """
    try:
        import nbd  # noqa: F401, PLC0415 - proves that it is there
    except ImportError as exc:
        raise CannotStart(
            "libnbd's Python binding is missing: install the package python3-libnbd "
            "(apt install python3-libnbd, dnf install python3-libnbd) for the Python that "
            "runs this server, in a virtual environment made with --system-site-packages."
        ) from exc
    _tls(settings)
    warnings = _check_config_directory(settings)
    try:
        prepare_directory(settings.runtime_dir)
        for path in settings.runtime_subdirs:
            prepare_directory(path)
        table = SharedTable(settings.runtime_dir, settings.slot_limits)
        table.open()
        table.close()
    except (UnusableDirectory, IncompatibleTable, OSError) as exc:
        raise CannotStart(f"IMAGESERVER_RUNTIME_DIR: {exc}.") from exc
    try:
        addresses.check(settings)
    except UnusableAddress as exc:
        raise CannotStart(f"{exc}.") from exc
    return warnings


def _tls(settings: Settings) -> ssl.SSLContext | None:
    try:
        return server_context(settings)
    except UnusableFiles as exc:
        raise CannotStart(f"{exc}.") from exc


def _check_config_directory(settings: Settings) -> list[str]:
    try:
        Registry(settings.config_dir, settings.config_owners).check()
    except FileNotFoundError:
        return [f"config directory {settings.config_dir} does not exist yet: no transfer is known"]
    except UntrustedDirectory as exc:
        raise CannotStart(
            f"IMAGESERVER_CONFIG_DIR: {exc}; chown it to a trusted owner and chmod 0755 it."
        ) from exc
    except OSError as exc:
        raise CannotStart(
            f"IMAGESERVER_CONFIG_DIR={settings.config_dir} cannot be used: {exc.strerror}."
        ) from exc
    return []


def on_starting(arbiter: Any) -> None:
    """Before anything is bound: check, clean up after predecessors, or end the process."""
    settings = load_settings()
    logs.configure(settings.log_level, settings.log_format)
    try:
        warnings = check(settings)
        arbiter.tls = _tls(settings)
        settings = _heeded(arbiter, settings)
        if activation.is_activated():
            activation.check(arbiter.cfg.address)
    except activation.WrongSockets as exc:
        raise SystemExit(f"imageserver: {exc}.") from exc
    except CannotStart as exc:
        raise SystemExit(f"imageserver: {exc}") from exc
    for warning in warnings:
        log.warning("%s", warning)
    _check_addresses(settings)
    clear_if_alone(settings.metrics_dir)
    metrics_in(settings.metrics_dir).begin()
    records(settings, Registry(settings.config_dir, settings.config_owners)).recover()
    _sweep(settings, prune=True)
    _reload_without_waiting(arbiter)
    _replace_before_the_drained_end(arbiter)
    _stop_with_abstract_sockets(arbiter)
    log.info("settings in force", extra=journal.fields(**_in_force(settings)))


def _in_force(settings: Settings) -> dict[str, str]:
    return {variable_of(f.name): settings.text(f.name) for f in fields(settings)}


def _heeded(arbiter: Any, settings: Settings) -> Settings:
    """Return the settings without those that the worker class would not heed."""
    if issubclass(arbiter.worker_class, ImageWorker):
        return settings
    for name in ("tls_cert", "control_socket"):
        if getattr(settings, name):
            raise CannotStart(
                f"{variable_of(name)} is set, but only the worker class of gunicorn.conf.py "
                "heeds it: leave the class as it is."
            )
    _bind_no_admin(arbiter, [bindable(address) for address in settings.admin_bind])
    return replace(settings, admin_bind=())


def _bind_no_admin(arbiter: Any, unbound: list[str]) -> None:
    """Leave the admin addresses unbound, now and after each reload: images would be served there.

    Only ``ImageWorker`` tells listeners apart, and the class is known after the addresses.
    """
    setup = arbiter.setup

    def leave_out() -> None:
        arbiter.cfg.set("bind", [bound for bound in arbiter.cfg.bind if bound not in unbound])

    def setup_without(app: Any) -> None:
        setup(app)
        leave_out()

    arbiter.setup = setup_without
    leave_out()


def _check_addresses(settings: Settings) -> None:
    if "GUNICORN_FD" in os.environ or "LISTEN_FDS" in os.environ:
        return  # sockets come from the running server, or from systemd
    try:
        addresses.check_free(settings)
    except UnusableAddress as exc:
        raise SystemExit(f"imageserver: {exc}.") from exc


def when_ready(arbiter: Any) -> None:
    """With all addresses bound, before the first worker."""
    settings = load_settings()
    if settings.control_socket and not arbiter.systemd:  # else imageserver.socket has its mode
        open_to_group(settings.control_socket)
    for address in settings.admin_bind:
        if not any(admin_name(listener, (address,)) for listener in arbiter.LISTENERS):
            # Sockets came from a server without this address, or the worker class is another.
            log.warning("nothing listens at IMAGESERVER_ADMIN_BIND=%s", address)
        elif not arbiter.systemd:
            close_to_others(address)


def pre_exec(arbiter: Any) -> None:
    """In an upgrade (SIGUSR2), before the new master: run the command, not what it once led to.

    scripts/install reaches releases through a link that may lead to a newer one by now.
    """
    command = arbiter.START_CTX["args"][1:]  # less the interpreter, which the old release has
    home = os.path.dirname(os.path.dirname(command[0]))
    if os.path.isabs(home) and os.path.isfile(os.path.join(home, "gunicorn.conf.py")):
        arbiter.START_CTX.update({0: command[0], "args": command, "cwd": home})
    if arbiter.systemd:
        activation.pass_on(arbiter.LISTENERS)


def post_fork(arbiter: Any, worker: Any) -> None:
    """In a new worker, before anything else."""
    if isinstance(worker, ImageWorker):  # else gunicorn was told to use another class
        worker.catch_early_signals(arbiter.SIG_QUEUE)
        worker.tls = arbiter.tls


def child_exit(_arbiter: Any, _worker: Any) -> None:
    """Free at once what a worker held. A courtesy: claims sweep too. Never raises."""
    try:
        _sweep(Settings.from_environ(os.environ))
    except Exception:  # an exception here would stop the master
        log.exception("sweep after a worker's exit failed")


def _sweep(settings: Settings, *, prune: bool = False) -> None:
    # Opened for this one sweep: a table kept open here would be inherited by every worker.
    metrics = LateMetrics(settings.metrics_dir)
    metrics.flush()  # else a master, which counts deaths only, would never make up for losses
    table = SharedTable(settings.runtime_dir, settings.slot_limits, metrics.freed)
    try:
        table.sweep()
        if prune:
            ImageLocks(settings.locks_dir, is_leaving, table.owner).prune()
    finally:
        table.close()


def _reload_without_waiting(arbiter: Any) -> None:
    """Keep the master responsive during a reload.

    gunicorn's ``reload`` waits for the old workers up to the graceful timeout, deaf to
    signals and to dying new workers. Ours drain for as long as a transfer takes and do not
    mind a second SIGTERM, which is what that wait is there to prevent.
    """
    reload = arbiter.reload

    def prompt_reload() -> None:
        graceful_timeout = arbiter.cfg.graceful_timeout
        try:
            reload()
        finally:
            arbiter.cfg.set("graceful_timeout", graceful_timeout)

    arbiter.reload = prompt_reload


def _replace_before_the_drained_end(arbiter: Any) -> None:
    """Keep as many workers as the settings say, apart from those that were told to stop.

    gunicorn counts them until they end. While old ones drain, which may take an hour, it
    would replace none of those that die, and leave the port to nobody. They stay among
    ``WORKERS``: gunicorn goes on watching, reaping and, on stop, awaiting them.
    """
    kill_worker = arbiter.kill_worker

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
            arbiter.spawn_worker()
            time.sleep(_SPAWN_SECONDS)

    arbiter.kill_worker = note_and_kill
    arbiter.manage_workers = manage_workers


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


def on_reload(arbiter: Any) -> None:
    """During a reload, after the configuration was read again and before workers start."""
    arbiter.cfg.set("graceful_timeout", 0)  # see above
    try:
        arbiter.tls = server_context(Settings.from_environ(os.environ))
    except (UnusableFiles, InvalidSetting) as exc:
        log.error("%s; new connections get the certificate as it was", exc)  # noqa: TRY400
