# SPDX-License-Identifier: Apache-2.0
"""The start of the master, before it binds an address, and its cleaning up after other servers.

If the server cannot start, a function here ends the process with one sentence (``SystemExit``).
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields

from imageserver.core.errors import StateUnavailable
from imageserver.core.slots import IncompatibleTable
from imageserver.observability.metrics.numbers import clear_if_alone
from imageserver.process import Process
from imageserver.runtime import tablefile
from imageserver.runtime.private import UnusableDirectory
from imageserver.server import addresses
from imageserver.server.addresses import UnusableAddress
from imageserver.server.preconditions import refuse_claimed
from imageserver.settings import InvalidSetting, Settings, variable_of

log = logging.getLogger(__name__)


def read_settings(
    flags: Mapping[str, str] | None = None, defaults: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings from this process's environment, and from the command line.

    ``flags``: see ``Settings.from_environ``. ``defaults``: texts by a setting's name, for what
    neither has, in place of those that are declared.
    """
    environ = {variable_of(name): text for name, text in (defaults or {}).items()}
    environ |= {name: text for name, text in os.environ.items() if text.strip()}
    try:
        return Settings.from_environ(environ, flags or {})
    except InvalidSetting as exc:
        raise SystemExit(f"imageserver: {exc}") from exc


def in_force(settings: Settings) -> dict[str, str]:
    """Return every setting by its variable."""
    return {variable_of(field.name): settings.text(field.name) for field in fields(settings)}


def set_umask() -> None:
    """Make new files private; with a umask such as 0277 the server could not open its own."""
    os.umask(0o077)


def require_free_addresses(settings: Settings) -> None:
    """Prove that nobody listens at the addresses of the settings."""
    if addresses.is_handed_over():
        return
    try:
        addresses.check_free(settings)
    except UnusableAddress as exc:
        raise SystemExit(f"imageserver: {exc}.") from exc


def take_over(process: Process) -> None:
    """Make what is missing in the runtime directory; clean up what earlier servers left there."""
    try:
        _prepare(process)
        clear_if_alone(process.settings.metrics_dir)
        process.metrics.begin()
        process.recover_transfers()
        sweep(process)
        process.locks.prune()
    except (UnusableDirectory, IncompatibleTable, StateUnavailable) as exc:
        raise SystemExit(f"imageserver: IMAGESERVER_RUNTIME_DIR: {exc}.") from exc
    except OSError as exc:
        where = exc.filename or process.settings.runtime_dir
        raise SystemExit(
            f"imageserver: IMAGESERVER_RUNTIME_DIR: {where} cannot be used: {exc.strerror}."
        ) from exc
    finally:
        process.slots.close()


def _prepare(process: Process) -> None:
    """Open the runtime directory and the slot table, which all workers inherit.

    The path is claimed once the table is held: a server that starts meanwhile, and finds the path
    claimed, finds the table in use, too.
    """
    runtime = process.runtime
    runtime.prepare()
    process.slots.open()
    process.slots.close()
    if not runtime.claim.take() and tablefile.is_alone(runtime):
        refuse_claimed(runtime.path)


def forget_registrations(process: Process) -> None:
    """Make all registered transfers unknown: the server ends, and was told to."""
    try:
        process.registrations.clear()
    except StateUnavailable as exc:
        log.warning("registered transfers stay: %s", exc)


def sweep(process: Process) -> None:
    """Free what dead processes held.

    The table is mapped for this only: if its file were cut short, a later access would end the
    master (SIGBUS).
    """
    try:
        process.slots.sweep()
    finally:
        process.slots.close()
        process.metrics.flush()  # the master writes its counts at no other time
