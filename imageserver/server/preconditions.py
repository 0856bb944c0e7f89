# SPDX-License-Identifier: Apache-2.0
"""The conditions of a start: one list for ``imageserver check``, a start and a reload.

A check changes nothing, on the disk or elsewhere; ``startup`` is what follows.
"""

import contextlib
import os
import ssl
import tempfile

from imageserver.backends.nbd.peers import require_sock_diag
from imageserver.core.errors import NoSlot, StateUnavailable
from imageserver.core.slots import SIZE, IncompatibleTable
from imageserver.process import Process
from imageserver.runtime import tablefile
from imageserver.runtime.pathclaim import claimants
from imageserver.runtime.private import UnusableDirectory, examine_runtime
from imageserver.runtime.processes import is_proc_ours
from imageserver.server import addresses
from imageserver.server.addresses import UnusableAddress
from imageserver.server.tls import UnusableFiles, server_context
from imageserver.settings import Settings, variable_of
from imageserver.transfers.files import TransferFiles, UntrustedDirectory

#: In memory: a heartbeat, which is a file's time, must not wait for a disk.
_HEARTBEATS = "/dev/shm"  # noqa: S108 - the files in it have no name for longer than a moment


class CannotStart(Exception):
    """The server must not start; ``str()`` is one sentence that says what to do."""


def check(settings: Settings) -> list[str]:
    """Prove that a server can start with these settings; return warnings. Changes nothing.

    Raises:
        CannotStart: it cannot.
    """
    _check_libnbd()
    tls_context(settings)
    _check_heartbeats()
    warnings = _check_directories(settings) + _limits_without_effect(settings)
    warnings += [
        f"IMAGESERVER_FILE_ROOTS: {root} is no directory: no file in it is served"
        for root in settings.file_roots
        if not os.path.isdir(root)
    ]
    warnings += _too_few_threads(settings) + _check_peers()
    try:
        addresses.check(settings)
    except UnusableAddress as exc:
        raise CannotStart(f"{exc}.") from exc
    return warnings


def check_reload(process: Process) -> None:
    """Prove that new workers of the master ``process`` can start. Changes nothing.

    Not checked: the addresses, which are bound by now; the certificate, for one that does not fit
    leaves the old one.

    Raises:
        CannotStart: they cannot.
    """
    _check_heartbeats()
    problem = process.runtime.problem()
    if problem:
        raise CannotStart(f"IMAGESERVER_RUNTIME_DIR: {problem}; restart the server.")
    try:
        with contextlib.closing(process.slots) as slots:  # mapped again at its next use
            slots.prove()
    except (IncompatibleTable, NoSlot, StateUnavailable, OSError, ValueError) as exc:
        raise CannotStart(f"no worker can take a slot now ({exc}); try again.") from exc
    _check_config_directory(process.settings)


def _limits_without_effect(settings: Settings) -> list[str]:
    """Return a warning for each limit per image that the total is below."""
    given = {
        "max_readers": (settings.max_readers, settings.max_readers_per_image),
        "max_writers": (settings.max_writers, settings.max_writers_per_image),
    }
    return [
        "{0}_PER_IMAGE={2} has no effect: {0}={1} is less".format(variable_of(name), *limits)
        for name, limits in given.items()
        if limits[1] is not None and limits[1] > limits[0]
    ]


def _too_few_threads(settings: Settings) -> list[str]:
    """Return a warning where transfers can take all threads, so that others get ``server busy``."""
    threads = settings.workers * settings.threads
    transfers = settings.max_readers + settings.max_writers
    if threads > transfers:
        return []
    warning = (
        f"IMAGESERVER_WORKERS x IMAGESERVER_THREADS = {threads} is not more than "
        f"IMAGESERVER_MAX_READERS + IMAGESERVER_MAX_WRITERS = {transfers}: "
        "while all of these run, other clients get 503 server busy"
    )
    return [warning]


def heartbeat_directory() -> str | None:
    """Return where workers show that they live; None: in the directory for temporary files."""
    return _HEARTBEATS if _takes_files(_HEARTBEATS) is None else None


def _takes_files(directory: str) -> OSError | None:
    """Return what keeps files from being made in a directory; None: nothing."""
    try:
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as exc:
        return exc
    return None


def _check_heartbeats() -> None:
    try:
        directory = heartbeat_directory() or tempfile.gettempdir()
        problem = _takes_files(directory)
    except FileNotFoundError as exc:  # of gettempdir: none can be written
        directory, problem = "any directory for temporary files", exc
    if problem is not None:
        raise CannotStart(
            f"no file can be made in {_HEARTBEATS} nor in {directory} ({problem.strerror}): "
            "workers show there that they live; make one of them writable, or set TMPDIR."
        ) from problem


def _check_libnbd() -> None:
    try:
        import nbd  # noqa: F401, PLC0415 - proves that it is there
    except ImportError as exc:
        raise CannotStart(
            "libnbd's Python binding is missing: install the package python3-libnbd "
            "(apt install python3-libnbd, dnf install python3-libnbd) for the Python that "
            "runs this server, in a virtual environment made with --system-site-packages."
        ) from exc


def _check_peers() -> list[str]:
    """Return a warning where nobody can tell whether a dead worker's writes may still land."""
    try:
        require_sock_diag()
    except OSError as exc:
        told = f"the kernel does not tell of Unix sockets (sock_diag(7): {exc.strerror})"
        then = "once a worker has died, writes to NBD images fail until the host is booted again"
        return [f"{told}: {then}; allow AF_NETLINK (RestrictAddressFamilies=, seccomp)"]
    return []


def _check_directories(settings: Settings) -> list[str]:
    warnings = _check_config_directory(settings)
    if not is_proc_ours():
        raise CannotStart(
            "/proc is missing, or that of another PID namespace, so the living cannot be told from "
            "the dead: mount it in this one (unshare --mount-proc does)."
        )
    path = settings.runtime_dir
    place, config = os.path.realpath(path), os.path.realpath(settings.config_dir)
    # A start cleans up in there. A link is refused below.
    if os.path.commonpath((place, config)) == place and not os.path.islink(path):
        raise CannotStart(
            f"IMAGESERVER_CONFIG_DIR: {settings.config_dir} is in IMAGESERVER_RUNTIME_DIR={path}, "
            "which is the server's own; choose another."
        )
    try:
        examine_runtime(path, SIZE)
        if os.path.isdir(path):
            tablefile.examine(path)
        if not (os.path.isdir(path) and tablefile.is_used(path)):
            refuse_claimed(path)
    except (UnusableDirectory, IncompatibleTable) as exc:
        raise CannotStart(f"IMAGESERVER_RUNTIME_DIR: {exc}.") from exc
    except OSError as exc:
        raise CannotStart(
            f"IMAGESERVER_RUNTIME_DIR: {path} cannot be used: {exc.strerror}."
        ) from exc
    return warnings


def refuse_claimed(path: str) -> None:
    """Refuse the path of a runtime directory that no process uses, but that processes claim.

    They run without the directory, which was removed or replaced (``runtime/pathclaim.py``).

    Raises:
        UnusableDirectory: there are such processes.
    """
    pids = claimants(path)
    if pids:
        raise UnusableDirectory(
            f"processes of a server that has lost {path} (it was removed or replaced) still run; "
            f"wait for or stop pid {', '.join(map(str, pids))}"
        )


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return the context of the settings' files, if there are such.

    Raises:
        CannotStart: they do not fit.
    """
    try:
        return server_context(settings)
    except UnusableFiles as exc:
        raise CannotStart(f"{exc}.") from exc


def _check_config_directory(settings: Settings) -> list[str]:
    try:
        TransferFiles(settings.config_dir, settings.config_owners).check()
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
