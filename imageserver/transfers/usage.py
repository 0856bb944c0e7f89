# SPDX-License-Identifier: Apache-2.0
"""How transfers are used, over all processes: one small file for each that can expire.

``usagerecord.py`` has the layout. Times are of the monotonic clock, which all processes share and
nobody can set; a file of an earlier boot is reset. Each request (visit) locks a byte of its own,
far beyond the record (F_OFD_SETLK, fcntl(2)), whose place is the time when it began: so the kernel
can count the requests, and drops the locks of processes that die. So does each connection to the
image's server that is kept on the transfer's behalf, elsewhere in the file. Any process stores a
time at any moment, 8 bytes at once; sums are changed under flock(2), which the kernel drops as
well.

A damaged file is reset as soon as that is noticed, as if the transfer had just been used: nothing
expires early for it, and nothing lives for ever.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator

from imageserver.core.errors import StateUnavailable
from imageserver.core.ports import Account, Owned
from imageserver.core.transfer import DAY_SECONDS, id_hash
from imageserver.runtime.flock import wait_flock
from imageserver.runtime.private import close_fd, open_private, own_files
from imageserver.runtime.processes import boot_id
from imageserver.transfers.usagerecord import (
    ACCOUNT,
    CHANGED,
    CLOSED,
    CUT,
    ID,
    SIZE,
    TOUCHED,
    DamagedRecord,
    Record,
    fresh_record,
    is_of_another_boot,
    pack_account,
    pack_id,
    pack_record,
    pack_word,
    parse_record,
)

log = logging.getLogger(__name__)

#: struct flock (fcntl(2)): type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")
#: Bytes that visits lock, [_FIRST, _LAST), and those that kept connections lock, [_LAST, _END):
#: one for each nanosecond, for 73 years without a reboot.
_FIRST, _LAST, _END = 1 << 20, 1 << 61, 1 << 62
#: Sums are changed within microseconds: only a process stopped meanwhile makes others wait.
_ADD_SECONDS = 1.0
#: The file of a transfer that does not exist any more is pruned after this time without use;
_PRUNE_NS = 60 * 1_000_000_000
#: one that was damaged, and does not say whose it is, after this one.
_PRUNE_DAMAGED_NS = DAY_SECONDS * 1_000_000_000
_OWN_FILES = own_files("the records of use")


class OpenActivity:
    """One transfer's file of use, opened for one visit: ``ports.Activity``.

    Every method raises ``StateUnavailable`` where the file cannot be read or written.
    """

    def __init__(self, path: str, fd: int, boot: bytes, now_ns: Callable[[], int]) -> None:
        self._path = path
        self._fd = fd
        self._boot = boot
        self._now_ns = now_ns

    def begin(self, transfer_id: str) -> Record:
        """Make the record one of this boot and transfer, if it is not; return what it says."""
        record = self._record(transfer_id)
        if record.transfer_id != transfer_id:
            self._write(ID, pack_id(transfer_id))
        return record

    def _record(self, transfer_id: str = "") -> Record:
        """Return what the file says; reset it where it has no record of this boot."""
        with contextlib.suppress(DamagedRecord):
            return self._parse()
        with self._alone(wait=True):
            return self._mended(transfer_id)

    def _mended(self, transfer_id: str = "") -> Record:
        """As ``_record``, for who has the sums locked."""
        with contextlib.suppress(DamagedRecord):
            return self._parse()
        was = self._read()
        fresh = fresh_record(self._now_ns(), transfer_id)
        self._write(0, pack_record(fresh, self._boot))
        if was and not is_of_another_boot(was, self._boot):
            log.warning("%s was damaged: it begins anew", self._path)
        return fresh

    def _parse(self) -> Record:
        return parse_record(self._read(), self._boot, self._now_ns())

    @_OWN_FILES
    def enter(self) -> bool:
        """Begin a visit; False where the file has been removed."""
        self._lock_byte(_FIRST)
        return os.fstat(self._fd).st_nlink > 0

    @_OWN_FILES
    def hold(self) -> None:
        """Say, until ``close``, that a connection is kept: see ``ports.Activity``."""
        self._lock_byte(_LAST)

    def _lock_byte(self, first: int) -> None:
        """Lock the byte of this moment, or the next one that nobody has locked."""
        for byte in itertools.count(first + self._now_ns()):
            lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)
            except BlockingIOError:
                continue
            return

    @_OWN_FILES
    def is_held(self) -> bool:
        """Tell whether others keep connections on the transfer's behalf."""
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _LAST, _END - _LAST, 0)
        found: int = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))[0]
        return found != fcntl.F_UNLCK

    @_OWN_FILES
    def visitors(self, for_ns: int | None = None) -> int:
        """Return how many visits others are on, or are on for longer than ``for_ns``."""
        count = 0
        spans = [(_FIRST, _LAST if for_ns is None else _FIRST + self._now_ns() - for_ns)]
        while spans:
            low, high = spans.pop()
            if low >= high:
                continue
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, low, high - low, 0)
            # The kernel returns one of the conflicting locks, not always the first.
            found = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))
            if found[0] != fcntl.F_UNLCK:
                count += 1
                spans += [(low, found[2]), (found[2] + 1, high)]
        return count

    def is_abandoned(self, is_known: Callable[[str], bool]) -> bool:
        """Tell whether the transfer does not exist any more, and no visit is on."""
        if is_of_another_boot(self._read(), self._boot):
            return True
        name = self._record().transfer_id
        if name and is_known(name):
            return False
        least_ns = _PRUNE_NS if name else _PRUNE_DAMAGED_NS
        return self.idle_ns() > least_ns and not self.visitors()

    def idle_ns(self) -> int:
        """Return how long ago ``touch`` was called last, in nanoseconds."""
        touched_ns = self._record().touched_ns
        return self._now_ns() - touched_ns

    def touch(self) -> None:
        """Say that the transfer is in use now."""
        self._set_word(TOUCHED, self._now_ns())

    @property
    def changed_ns(self) -> int:
        """Which state of the control program's file was last used: its time of change."""
        return self._record().changed_ns

    @changed_ns.setter
    def changed_ns(self, value: int) -> None:
        self._set_word(CHANGED, value)

    def cut(self) -> None:
        """Ask every visit that has begun to end at once."""
        self._set_word(CUT, self._now_ns())

    def is_cut(self, began_ns: int) -> bool:
        """Tell whether a visit begun at ``began_ns`` is to end."""
        return began_ns <= self._record().cut_ns

    @property
    def is_closed(self) -> bool:
        """No visit may begin: the transfer was unregistered."""
        return self._record().is_closed

    def set_closed(self, *, closed: bool) -> None:
        """Say whether visits may begin."""
        self._set_word(CLOSED, int(closed))

    def _set_word(self, at: int, value: int) -> None:
        self._write(at, pack_word(value))

    @_OWN_FILES
    def _read(self) -> bytes:
        return os.pread(self._fd, SIZE, 0)

    @_OWN_FILES
    def _write(self, at: int, data: bytes) -> None:
        os.pwrite(self._fd, data, at)

    def add(self, done: Account, *, wait: bool) -> bool:
        """Add to the account; False where another process held the sums."""
        with self._alone(wait=wait) as is_alone:
            if is_alone:
                known = self._mended().account
                now = Account(
                    known.bytes_read + done.bytes_read,
                    known.bytes_written + done.bytes_written,
                    known.last_error if done.last_error is None else done.last_error,
                )
                self._write(ACCOUNT, pack_account(now))
        return is_alone

    def account(self) -> Account:
        """Return what has been done with the transfer."""
        return self._record().account

    @contextlib.contextmanager
    def _alone(self, *, wait: bool) -> Iterator[bool]:
        """Lock the sums against other processes; yield whether that worked."""
        with _OWN_FILES:
            is_alone = wait_flock(self._fd, _ADD_SECONDS if wait else 0)
        try:
            yield is_alone
        finally:
            if is_alone:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Remove the file. A visit that begins in it is told by ``enter``."""
        with _OWN_FILES, contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def remove_if_empty(self) -> None:
        """Remove a file that never had a record: on a full disk it cannot be used."""
        with contextlib.suppress(StateUnavailable):
            if not self._read():
                self.remove()

    def close(self) -> None:
        """Close the file, and end the visit with it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)


class ActivityFiles:
    """All activity files, in ``directory``: ``ports.Activities``."""

    def __init__(self, directory: str, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._directory = directory
        self._now_ns = now_ns
        self._boot = boot_id()

    def find(self, owned: Owned, transfer_id: str, *, visit: bool) -> OpenActivity | None:
        """Open the file of a transfer's use: see ``ports.Activities``."""
        while activity := self.find_hashed(owned, id_hash(transfer_id)):
            with contextlib.ExitStack() as opened:
                opened.callback(activity.close)
                if activity.begin(transfer_id).is_closed and visit:
                    return None
                if not visit or activity.enter():
                    opened.pop_all()
                    return activity
        return None

    def make(self, owned: Owned, transfer_id: str) -> OpenActivity:
        """Open or make the file of a transfer's use: see ``ports.Activities``."""
        path = self._path(owned, id_hash(transfer_id))
        while True:
            with _OWN_FILES, contextlib.ExitStack() as opened:
                fd = open_private(*os.path.split(path))
                activity = OpenActivity(path, fd, self._boot, self._now_ns)
                opened.callback(activity.close)
                opened.callback(activity.remove_if_empty)
                activity.begin(transfer_id)
                if activity.enter():
                    opened.pop_all()
                    return activity

    def prune(self, owned: Owned, is_known: Callable[[str], bool]) -> int:
        """Remove the files of transfers that do not exist any more; return how many."""
        with _OWN_FILES, os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries]
        pruned = 0
        for name in names:
            prefix, _, digest = name.partition("-")
            if prefix == owned.value:
                try:
                    pruned += self._prune_one(owned, digest, is_known)
                except StateUnavailable as exc:
                    log.warning("%s: %s", name, exc)
        return pruned

    def _prune_one(self, owned: Owned, digest: str, is_known: Callable[[str], bool]) -> bool:
        activity = self.find_hashed(owned, digest)
        if activity is None:
            return False
        with contextlib.closing(activity):
            is_abandoned = activity.is_abandoned(is_known)
            if is_abandoned:
                activity.remove()
        return is_abandoned

    def find_hashed(self, owned: Owned, digest: str) -> OpenActivity | None:
        """Open the file of the transfer whose id has this hash; None: there is none."""
        path = self._path(owned, digest)
        # O_NONBLOCK: a FIFO that somebody has made there must not block.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with _OWN_FILES:
            try:
                fd = os.open(path, flags)
            except FileNotFoundError:
                return None
        return OpenActivity(path, fd, self._boot, self._now_ns)

    def _path(self, owned: Owned, digest: str) -> str:
        return os.path.join(self._directory, f"{owned.value}-{digest}")
