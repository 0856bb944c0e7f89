# SPDX-License-Identifier: Apache-2.0
"""gunicorn's hooks as plain functions; ``gunicorn.conf.py`` names them and has no logic.

The master ends, and its workers with it, at the first exception that a hook lets pass: none does
once it serves.
"""

import logging
import os
from dataclasses import fields, replace
from typing import Any

from imageserver.core import entry
from imageserver.core.errors import StateUnavailable
from imageserver.observability import logs
from imageserver.observability.metrics.counted import LateMetrics, metrics_in
from imageserver.observability.metrics.numbers import clear_if_alone
from imageserver.runtime.directory import runtime_in
from imageserver.runtime.locks import ImageLocks
from imageserver.runtime.processes import is_exiting
from imageserver.runtime.slottable import SharedTable
from imageserver.server import activation, addresses, master
from imageserver.server.addresses import UnusableAddress
from imageserver.server.admin_listener import admin_name, bindable
from imageserver.server.admin_listener import close_to_others as close_admin_to_others
from imageserver.server.control import open_to_group
from imageserver.server.preconditions import CannotStart, check, prepare, tls_context
from imageserver.server.worker import ImageWorker
from imageserver.settings import InvalidSetting, Settings, variable_of
from imageserver.transfers.files import TransferFiles
from imageserver.transfers.records import records

log = logging.getLogger(__name__)


def load_settings() -> Settings:
    """Read the settings, or end the process with a sentence."""
    try:
        return Settings.from_environ(os.environ)
    except InvalidSetting as exc:
        raise SystemExit(f"imageserver: {exc}") from exc


def on_starting(arbiter: Any) -> None:
    """Before anything is bound: check, clean up after predecessors, or end the process."""
    settings = load_settings()
    logs.configure(settings.log_level, settings.log_format)
    close_to_others()
    try:
        warnings = check(settings)
        arbiter.tls = tls_context(settings)
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
    _take_over(settings)
    master.adapt(arbiter, settings, lambda: child_exit(arbiter, None))
    log.info("settings in force", extra=entry.fields(**_in_force(settings)))


def close_to_others() -> None:
    """Have files made for this user alone: another umask may make some that nobody can open."""
    os.umask(0o077)


def _take_over(settings: Settings) -> None:
    """Put in order what predecessors have left in the runtime directory, or end the process."""
    try:
        prepare(settings)
        clear_if_alone(settings.metrics_dir)
        metrics_in(settings.metrics_dir).begin()
        records(settings, TransferFiles(settings.config_dir, settings.config_owners)).recover()
        _sweep(settings, prune=True)
    except CannotStart as exc:
        raise SystemExit(f"imageserver: {exc}") from exc
    except StateUnavailable as exc:
        raise SystemExit(f"imageserver: IMAGESERVER_RUNTIME_DIR: {exc}.") from exc
    except OSError as exc:
        where = exc.filename or settings.runtime_dir
        raise SystemExit(
            f"imageserver: IMAGESERVER_RUNTIME_DIR: {where} cannot be used: {exc.strerror}."
        ) from exc


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
    try:
        _set_modes(arbiter, settings)
    except OSError as exc:
        raise SystemExit(f"imageserver: {exc.filename}: {exc.strerror}.") from exc


def _set_modes(arbiter: Any, settings: Settings) -> None:
    if settings.control_socket and not arbiter.systemd:  # else imageserver.socket has its mode
        open_to_group(settings.control_socket)
    for address in settings.admin_bind:
        if not any(admin_name(listener, (address,)) for listener in arbiter.LISTENERS):
            # Sockets came from a server without this address, or the worker class is another.
            log.warning("nothing listens at IMAGESERVER_ADMIN_BIND=%s", address)
        elif not arbiter.systemd:
            close_admin_to_others(address)


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
    # Mapped for this one sweep: a file that others cut short would end the master.
    metrics = LateMetrics(settings.metrics_dir)
    runtime = runtime_in(settings.runtime_dir)
    table = SharedTable(runtime, settings.slot_limits, metrics.freed)
    try:
        table.sweep()
        if prune:
            ImageLocks(runtime.locks, is_exiting, table.owner).prune()
    finally:
        table.close()
        metrics.flush()  # a master does so at no other time


def on_reload(arbiter: Any) -> None:
    """During a reload, after the configuration was read again and before workers start."""
    arbiter.cfg.set("graceful_timeout", 0)  # see above
    try:
        arbiter.tls = tls_context(Settings.from_environ(os.environ))
    except (CannotStart, InvalidSetting) as exc:
        log.error("%s New connections get the certificate as it was", exc)  # noqa: TRY400
