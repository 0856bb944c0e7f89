# SPDX-License-Identifier: Apache-2.0
"""The checks of ``/readyz``, by name: could this server serve transfers now?

Each runs anew for each request of ``/readyz``, and holds nothing that a transfer could need. A
check that passes returns "", any other a sentence without its full stop.
"""

import fcntl
import tempfile
from collections.abc import Callable, Mapping

from imageserver.core.errors import NoSlot, StateUnavailable
from imageserver.core.slots import IncompatibleTable
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.slottable import SharedTable
from imageserver.settings import Settings
from imageserver.transfers.files import TransferFiles, UntrustedDirectory

Checks = Mapping[str, Callable[[], str]]


def checks(
    settings: Settings, files: TransferFiles, table: SharedTable, runtime: RuntimeDirectory
) -> Checks:
    """Return the checks, in the order of the answer."""
    return {
        "config_dir": lambda: _config_directory(files, settings.config_dir),
        "runtime_dir": lambda: _runtime_directory(runtime),
        "slot_table": lambda: _slot_table(table),
    }


def _config_directory(files: TransferFiles, path: str) -> str:
    try:
        files.check()
    except UntrustedDirectory as exc:
        return str(exc)
    except OSError as exc:
        return f"{path} cannot be used: {exc.strerror}"
    return ""


def _runtime_directory(runtime: RuntimeDirectory) -> str:
    try:
        with tempfile.TemporaryFile(dir=runtime.path, prefix="ready-") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(b"\n")  # on a full disk a file can be made, but not written
            file.flush()
    except OSError as exc:
        return f"no file can be made and locked in {runtime.path}: {exc.strerror}"
    return runtime.problem()


def _slot_table(table: SharedTable) -> str:
    try:
        table.prove()
    except NoSlot:
        return "every record is taken"
    except (IncompatibleTable, StateUnavailable) as exc:
        return str(exc)
    except OSError as exc:
        return f"cannot be used: {exc.strerror}"
    return ""
