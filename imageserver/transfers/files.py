# SPDX-License-Identifier: Apache-2.0
"""The config directory: from a transfer's id to its parsed file, on demand.

Whoever can write here decides what the server opens. So a directory or file that anybody but the
configured owners could have written is ignored, links are not followed, and the checks are made on
the opened file, not on its name. An ignored file leaves its id unknown, and is logged once per
change.
"""

import contextlib
import errno
import logging
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from imageserver.backends.table import KINDS
from imageserver.core.entry import fields
from imageserver.core.errors import NO_DESCRIPTOR, Exhausted, StateUnavailable, UnknownImage
from imageserver.core.transfer import (
    MAX_TRANSFER_SIZE,
    InvalidTransfer,
    Transfer,
    is_valid_id,
    open_to_others,
    parse_transfer,
    path_bytes,
    path_text,
)
from imageserver.runtime.private import close_fd

log = logging.getLogger(__name__)

#: A file changed within this time may change again without a new mtime (docs/api.md).
_SETTLED_NS = 2_000_000_000
_CACHE_SIZE = 1024
#: Errors of the machine: whether the file exists is not known.
_HOST_ERRORS = NO_DESCRIPTOR | {errno.ENOMEM, errno.EIO}


class _Version(NamedTuple):
    """A file's content, as far as stat(2) can tell one from another."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    uid: int
    mode: int


class UntrustedDirectory(Exception):
    """The config directory could have been written by others; ``str()`` is a sentence."""


class TransferFiles:
    """Transfers by id, from files of ``directory``, looked at in every call. Thread-safe."""

    def __init__(
        self,
        directory: str,
        owners: tuple[int, ...],
        is_first: Callable[[str], bool] = lambda _: True,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """``is_first`` tells whether no other worker has logged this already."""
        self._is_first = is_first
        self._directory = directory
        self._prefix = os.path.join(os.fsencode(directory), b"")
        self._owners = frozenset(owners)
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, tuple[_Version, Transfer]] = OrderedDict()
        self._reported: OrderedDict[str, object] = OrderedDict()

    def get(self, transfer_id: str) -> Transfer:
        """Return the transfer that ``transfer_id`` names now.

        Raises:
            UnknownImage: there is none, or its file is ignored.
            Exhausted: no descriptor is free.
            StateUnavailable: the machine is out of memory, or the disk cannot be read.
        """
        cached = self._cached(transfer_id)
        if cached:
            return cached
        if not is_valid_id(transfer_id):
            raise UnknownImage(transfer_id)
        try:
            directory = self._open_directory()
        except FileNotFoundError as exc:
            raise UnknownImage(transfer_id) from exc
        except (OSError, UntrustedDirectory) as exc:
            _blame_host(exc)
            self._report("", f"config directory: {exc}", _stat_or_none(self._directory))
            raise UnknownImage(transfer_id) from exc
        self._reported.pop("", None)
        try:
            return self._get(directory, transfer_id)
        finally:
            close_fd(directory)

    def check(self) -> None:
        """Prove that the directory can be used.

        Raises:
            FileNotFoundError: it does not exist (yet).
            OSError, UntrustedDirectory: it cannot be used.
        """
        fd = self._open_directory()
        try:
            os.stat(".", dir_fd=fd)  # who may not search it finds no file there
        finally:
            close_fd(fd)

    def has(self, transfer_id: str) -> bool:
        """Tell whether there is a file of this name, ignored or not."""
        return os.path.lexists(self._path(transfer_id))

    def _path(self, transfer_id: str) -> bytes:
        return self._prefix + path_bytes(transfer_id)

    def _open_directory(self) -> int:
        fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.ExitStack() as opened:
            opened.callback(close_fd, fd)
            problem = self._distrust(os.fstat(fd))
            if problem:
                raise UntrustedDirectory(f"{self._directory} {problem}")
            opened.pop_all()
        return fd

    def _distrust(self, found: os.stat_result) -> str | None:
        if found.st_uid not in self._owners:
            return f"belongs to uid {found.st_uid}, who is not in IMAGESERVER_CONFIG_OWNERS"
        return open_to_others(found.st_mode)

    def _cached(self, transfer_id: str) -> Transfer | None:
        """Return the cached transfer, if its directory is trusted and its file unchanged."""
        cached = self._cache.get(transfer_id)
        if cached is None:
            return None
        try:
            directory = os.stat(self._directory)
            found = os.lstat(self._path(transfer_id))
        except OSError:
            return None
        if self._distrust(directory) or _version(found) != cached[0]:
            return None
        with self._lock:
            if transfer_id in self._cache:
                self._cache.move_to_end(transfer_id)
        return cached[1]

    def _get(self, directory: int, transfer_id: str) -> Transfer:
        version = None
        try:
            version = _version(
                os.stat(path_bytes(transfer_id), dir_fd=directory, follow_symlinks=False)
            )
            version, transfer = self._read(directory, transfer_id)
        except FileNotFoundError as exc:
            self._forget(transfer_id)
            raise UnknownImage(transfer_id) from exc
        except OSError as exc:
            _blame_host(exc)
            problem = "is a symbolic link" if exc.errno == errno.ELOOP else str(exc.strerror)
            self._report(transfer_id, f"cannot be read: {problem}", version)
            raise UnknownImage(transfer_id) from exc
        except InvalidTransfer as exc:
            self._report(transfer_id, str(exc), version)
            raise UnknownImage(transfer_id) from exc
        self._remember(transfer_id, version, transfer)
        return transfer

    def _read(self, directory: int, transfer_id: str) -> tuple[_Version, Transfer]:
        # O_NONBLOCK: a FIFO must not block before fstat(2) has told what it is.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(path_bytes(transfer_id), flags, dir_fd=directory)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise InvalidTransfer("not a regular file")
            problem = self._distrust(found)
            if problem:
                raise InvalidTransfer(problem)
            text = b""
            while len(text) <= MAX_TRANSFER_SIZE:
                piece = os.read(fd, MAX_TRANSFER_SIZE + 1 - len(text))
                if not piece:
                    transfer = parse_transfer(transfer_id, text, KINDS)
                    return _version(found), replace(transfer, changed_ns=found.st_ctime_ns)
                text += piece
            raise InvalidTransfer(f"larger than {MAX_TRANSFER_SIZE} bytes")
        finally:
            close_fd(fd)

    def _remember(self, transfer_id: str, version: _Version, transfer: Transfer) -> None:
        with self._lock:
            if not transfer.ignored:
                self._reported.pop(transfer_id, None)
            self._cache.pop(transfer_id, None)
            if self._now_ns() - version.mtime_ns > _SETTLED_NS:
                self._cache[transfer_id] = version, transfer
                if len(self._cache) > _CACHE_SIZE:
                    self._cache.popitem(last=False)
        if transfer.ignored:
            problem = ", ".join(transfer.ignored)
            self._log_once(transfer_id, version, "transfer file has ignored fields", problem)

    def _forget(self, transfer_id: str) -> None:
        with self._lock:
            self._cache.pop(transfer_id, None)
            self._reported.pop(transfer_id, None)

    def _report(self, name: str, problem: str, version: _Version | None = None) -> None:
        with self._lock:
            self._cache.pop(name, None)
        self._log_once(name, version, "transfer file ignored", problem)

    def _log_once(self, name: str, version: _Version | None, event: str, problem: str) -> None:
        """Warn of a file, or of the directory (""), once per change and over all workers."""
        with self._lock:
            seen = self._reported.get(name) == (version, problem)
            self._reported[name] = version, problem
            self._reported.move_to_end(name)
            if len(self._reported) > _CACHE_SIZE:
                self._reported.popitem(last=False)
        path = path_text(self._path(name) if name else os.fsencode(self._directory))
        if not seen and self._is_first(f"{path} {version} {problem}"):
            log.warning(event, extra=fields(path=path, problem=problem))


def _blame_host(exc: Exception) -> None:
    """Raise what is the machine's fault: an id that cannot be looked up is not unknown."""
    if isinstance(exc, OSError) and exc.errno in _HOST_ERRORS:
        error = Exhausted if exc.errno in NO_DESCRIPTOR else StateUnavailable
        raise error(f"transfers cannot be read now: {exc.strerror}") from exc


def _stat_or_none(path: str) -> _Version | None:
    try:
        return _version(os.stat(path))
    except OSError:
        return None


def _version(found: os.stat_result) -> _Version:
    return _Version(
        found.st_dev,
        found.st_ino,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
        found.st_uid,
        found.st_mode,
    )
