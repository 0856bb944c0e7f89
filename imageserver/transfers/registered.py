# SPDX-License-Identifier: Apache-2.0
"""Registered transfers: files that the server itself writes, for all its processes.

A file is named by a hash of the id, and has the fields of a control program's file and the id. It
is made and replaced by a rename, so that readers see the old or the new one.

The file of a registration's use is made before the registration and removed after it. So a request
begins its visit first and reads the registration then: every later ``remove`` sees the visit.
Changes hold a lock, which the kernel drops with its holder.
"""

import contextlib
import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

from imageserver.core.errors import StateUnavailable, UnknownImage
from imageserver.core.jsontext import InvalidJson, parse_json
from imageserver.core.ports import Owned
from imageserver.core.transfer import (
    MAX_TRANSFER_SIZE,
    InvalidTransfer,
    Transfer,
    id_hash,
    is_valid_id,
    overdue_ns,
    to_secret_fields,
)
from imageserver.runtime.guard import guarded
from imageserver.runtime.private import (
    close_fd,
    open_private,
    own_files,
    read_regular,
    write_all,
)
from imageserver.transfers.files import TransferFiles
from imageserver.transfers.usage import ActivityFiles

log = logging.getLogger(__name__)

_LOCK = "registered.lock"
#: The lock is held for milliseconds: only a process stopped meanwhile makes others wait.
_LOCK_SECONDS = 5.0
_WHAT = "the registrations"
#: Prefix of files before they are renamed; hashes do not begin so.
_NEW = "new-"


class RegistrationFiles:
    """All registrations, in ``directory``: ``ports.Registrations``; one for each process."""

    def __init__(
        self,
        directory: str,
        activities: ActivityFiles,
        require: Callable[[], None] = lambda: None,
    ) -> None:
        """``require`` raises ``StateUnavailable`` where the directory was removed or replaced."""
        self._require = require
        self._directory = directory
        self._activities = activities
        self._files = TransferFiles(directory, (os.geteuid(),))
        self._fresh: dict[tuple[str, int], int] = {}

    def get(self, transfer_id: str) -> Transfer:
        """Look an id up: see ``ports.Transfers``."""
        self._require()
        return self._files.get(id_hash(transfer_id))

    @own_files(_WHAT)
    def store(self, transfer: Transfer) -> None:
        """Make a transfer known: see ``ports.Registrations``.

        Raises:
            InvalidTransfer: its file would be too large.
            StateUnavailable: the directory was removed or replaced, or it cannot be written.
        """
        self._require()
        fields = {"transfer_id": transfer.id} | to_secret_fields(transfer)
        text = json.dumps(fields, ensure_ascii=False).encode()
        if len(text) > MAX_TRANSFER_SIZE:
            raise InvalidTransfer(f"larger than {MAX_TRANSFER_SIZE} bytes")
        with self._lock():
            activity = self._activities.make(Owned.REGISTERED, transfer.id)
            with contextlib.closing(activity):
                activity.touch()
                self._write(id_hash(transfer.id), text)
                activity.set_closed(closed=False)

    def _write(self, name: str, text: bytes) -> None:
        new = _NEW + secrets.token_hex(8)
        fd = open_private(self._directory, new)
        try:
            try:
                write_all(fd, text)
                os.fsync(fd)
            finally:
                close_fd(fd)
            os.rename(self._path(new), self._path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(self._path(new))
            raise
        self._sync()

    def _sync(self) -> None:
        """Have names that were made, changed or removed outlive a power cut."""
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            close_fd(fd)

    @own_files(_WHAT)
    def remove(self, transfer_id: str) -> None:
        """Make a transfer unknown: see ``ports.Registrations``."""
        self._require()
        with self._lock():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path(id_hash(transfer_id)))
                self._sync()
            activity = self._activities.find(Owned.REGISTERED, transfer_id, visit=False)
            if activity:
                with contextlib.closing(activity):
                    activity.set_closed(closed=True)

    @own_files(_WHAT)
    def forget(self, transfer_id: str) -> None:
        """Remove the file of use of a removed transfer: see ``ports.Registrations``."""
        with self._lock():
            activity = self._activities.find(Owned.REGISTERED, transfer_id, visit=False)
            if activity:
                with contextlib.closing(activity):
                    if activity.is_closed and not activity.visitors():
                        activity.remove()

    @own_files(_WHAT)
    def count(self) -> int:
        """Return how many there are that have not expired: see ``ports.Registrations``."""
        self._require()
        now_ns = time.monotonic_ns()
        fresh = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(_NEW):
                    continue
                version = entry.name, entry.inode()
                # If it was used since, it expires later.
                lasts_ns = self._fresh.get(version, 0)
                if lasts_ns <= now_ns:
                    lasts_ns = self._lasts_ns(entry.name)
                if lasts_ns > now_ns:
                    fresh[version] = lasts_ns
        self._fresh = fresh
        return len(fresh)

    @own_files(_WHAT)
    def all(self) -> list[Transfer]:
        """Return the transfers that have not expired: see ``ports.Registrations``."""
        self._require()
        found = []
        for name in os.listdir(self._directory):
            if name.startswith(_NEW):
                continue
            # It may be unregistered meanwhile.
            with contextlib.suppress(FileNotFoundError, UnknownImage):
                transfer_id = self._id_of(name) if self._counts(name) else None
                if transfer_id is not None:
                    found.append(replace(self._files.get(name), id=transfer_id))
        return sorted(found, key=lambda transfer: transfer.id)

    def _lasts_ns(self, name: str) -> int:
        """Return when (monotonic clock) a registration expires if it is not used again."""
        try:
            transfer = self._files.get(name)
        except UnknownImage:
            return 0
        try:
            activity = self._activities.find_hashed(Owned.REGISTERED, name)
            if activity is None:
                return 0
            with contextlib.closing(activity):
                unused_ns = activity.idle_ns()
                over_ns = overdue_ns(transfer, unused_ns)
                if over_ns is not None and activity.visitors(over_ns):
                    unused_ns = 0  # as in lookup.py
        except StateUnavailable:
            unused_ns = 0  # whether it has expired is not known
        return time.monotonic_ns() - unused_ns + (transfer.idle_seconds or 0) * 1_000_000_000

    def clear(self) -> None:
        """Make all transfers unknown."""
        with own_files(_WHAT):
            names = os.listdir(self._directory)
            ids = [self._id_of(name) for name in names if not name.startswith(_NEW)]
        for transfer_id in ids:
            if transfer_id is not None:
                self.remove(transfer_id)
                self.forget(transfer_id)

    def prune(self, has_file: Callable[[str], bool]) -> None:
        """Remove expired registrations, but for those that hide a control program's file."""
        with own_files(_WHAT):
            names = os.listdir(self._directory)
        for name in names:
            try:
                self._prune_one(name, has_file)
            except StateUnavailable as exc:
                log.warning("%s: %s", self._path(name), exc)
        with self._lock():
            self._activities.prune(Owned.REGISTERED, self._is_known)

    @own_files(_WHAT)
    def _prune_one(self, name: str, has_file: Callable[[str], bool]) -> None:
        if name.startswith(_NEW) or self._counts(name):
            return
        with self._lock(), contextlib.suppress(FileNotFoundError):
            transfer_id = self._id_of(name)
            hides = transfer_id is not None and has_file(transfer_id)
            if not self._counts(name) and not hides:
                os.unlink(self._path(name))

    def recover(self) -> None:
        """Remove the remains of writers that died; make files of use that a reboot has removed."""
        with self._lock():
            for name in os.listdir(self._directory):
                transfer_id = None if name.startswith(_NEW) else self._id_of(name)
                if transfer_id is not None:
                    self._activities.make(Owned.REGISTERED, transfer_id).close()
                    continue
                try:
                    os.unlink(self._path(name))
                except OSError as exc:  # a directory, say, that somebody has made here
                    log.warning("%s is no registration: %s", self._path(name), exc.strerror)

    def _counts(self, name: str) -> bool:
        return self._lasts_ns(name) > time.monotonic_ns()

    def _is_known(self, transfer_id: str) -> bool:
        return os.path.lexists(self._path(id_hash(transfer_id)))

    def _id_of(self, name: str) -> str | None:
        """Return the id of a registration's file; None where it is no registration."""
        transfer_id = parse_id(read_regular(self._path(name), MAX_TRANSFER_SIZE) or b"")
        return transfer_id if transfer_id and id_hash(transfer_id) == name else None

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return guarded(os.path.dirname(self._directory), _LOCK, _WHAT, _LOCK_SECONDS)


def parse_id(text: bytes) -> str | None:
    """Return the id that a registration's file names; None where it names none."""
    try:
        fields = parse_json(text)
    except InvalidJson:
        return None
    transfer_id = fields.get("transfer_id") if isinstance(fields, dict) else None
    return transfer_id if isinstance(transfer_id, str) and is_valid_id(transfer_id) else None
