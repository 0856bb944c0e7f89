# SPDX-License-Identifier: Apache-2.0
"""How transfers are used, over all processes: one small file for each that can expire.

    8s magic   16s boot   Q touched   Q cut   Q closed   Q read   Q written   256s error   256s id

Times are of the monotonic clock, which all processes share and no one sets; a file of an
earlier boot begins anew. A visitor holds a lock on a byte of its own, at random, far beyond
the record (F_OFD_SETLK, fcntl(2)): so the kernel knows how many there are, and takes those
that die off the list. Times are stored by whoever likes, 8 bytes at once; what is added up
is changed under flock(2), which the kernel, too, drops with its holder.
"""

import contextlib
import fcntl
import os
import random
import struct
import time
from collections.abc import Callable, Iterator

from imageserver.ports import Account, Owned
from imageserver.private import open_private
from imageserver.processes import boot_id
from imageserver.transfers import id_hash

_RECORD = struct.Struct("<8s16sQQQQQ256s256s")
_MAGIC = b"imgactv1"
_TOUCHED, _CUT, _CLOSED, _ACCOUNT = 24, 32, 40, 48
_SUMS = struct.Struct("<QQ256s")
_ID = _RECORD.size - 256

#: struct flock (fcntl(2)): type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")
_FIRST, _LAST = 1 << 20, 1 << 62
#: Sums are changed within microseconds. Only a process stopped meanwhile can make us wait.
_ADD_SECONDS = 1.0
#: What is left of a transfer that is known no more is pruned after this time.
_PRUNE_NS = 60 * 1_000_000_000


class OpenActivity:
    """One transfer's activity, as this visitor has it open: ``ports.Activity``."""

    def __init__(self, path: str, fd: int, now_ns: Callable[[], int]) -> None:
        self._path = path
        self._fd = fd
        self._now_ns = now_ns

    def begin(self, boot: bytes, transfer_id: str) -> None:
        """Make the record one of this boot, if it is not."""
        if self._head(boot):
            return
        with self._alone(wait=True):
            if not self._head(boot):
                name = transfer_id.encode()
                record = _RECORD.pack(_MAGIC, boot, self._now_ns(), 0, 0, 0, 0, b"", name)
                os.pwrite(self._fd, record, 0)

    def _head(self, boot: bytes) -> bool:
        return os.pread(self._fd, _TOUCHED, 0) == _MAGIC + boot

    def enter(self) -> bool:
        """Become a visitor; False where the file has been removed."""
        while True:
            byte = random.randrange(_FIRST, _LAST)  # noqa: S311 - no secret
            lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, lock)
            except BlockingIOError:
                continue
            return os.fstat(self._fd).st_nlink > 0

    def visitors(self) -> int:
        """Return how many visits others are on."""
        count = 0
        spans = [(_FIRST, _LAST)]
        while spans:
            low, high = spans.pop()
            if low >= high:
                continue
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, low, high - low, 0)
            # The kernel names one lock of those in the way, not always the first.
            found = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, asked))
            if found[0] != fcntl.F_UNLCK:
                count += 1
                spans += [(low, found[2]), (found[2] + 1, high)]
        return count

    def is_abandoned(self, boot: bytes, is_known: Callable[[str], bool]) -> bool:
        """Tell whether the transfer is known no more, and nobody is there."""
        if not self._head(boot):
            return True
        name = os.pread(self._fd, 256, _ID).rstrip(b"\0").decode()
        return not is_known(name) and self.idle_ns() > _PRUNE_NS and not self.visitors()

    def idle_ns(self) -> int:
        """Return how long ago ``touch`` was called last, in nanoseconds."""
        return self._now_ns() - self._word(_TOUCHED)

    def touch(self) -> None:
        """Say that the transfer is in use now."""
        self._set_word(_TOUCHED, self._now_ns())

    def cut(self) -> None:
        """Ask every visit that has begun to end at once."""
        self._set_word(_CUT, self._now_ns())

    def is_cut(self, began_ns: int) -> bool:
        """Tell whether a visit begun at ``began_ns`` is to end."""
        return began_ns <= self._word(_CUT)

    @property
    def is_closed(self) -> bool:
        """Nobody may enter: the transfer was unregistered."""
        return bool(self._word(_CLOSED))

    def set_closed(self, *, closed: bool) -> None:
        """Say whether visitors may enter."""
        self._set_word(_CLOSED, int(closed))

    def _word(self, at: int) -> int:
        return int.from_bytes(os.pread(self._fd, 8, at), "little")

    def _set_word(self, at: int, value: int) -> None:
        os.pwrite(self._fd, value.to_bytes(8, "little"), at)

    def add(self, done: Account, *, wait: bool) -> bool:
        """Add to the account; False where another process was at it."""
        with self._alone(wait=wait) as is_alone:
            if is_alone:
                read, written, error = _SUMS.unpack(os.pread(self._fd, _SUMS.size, _ACCOUNT))
                if done.last_error is not None:
                    error = done.last_error.encode(errors="replace")[:256]
                sums = _SUMS.pack(read + done.bytes_read, written + done.bytes_written, error)
                os.pwrite(self._fd, sums, _ACCOUNT)
        return is_alone

    def account(self) -> Account:
        """Return what has been done with the transfer."""
        read, written, error = _SUMS.unpack(os.pread(self._fd, _SUMS.size, _ACCOUNT))
        text = error.rstrip(b"\0").decode(errors="replace")
        return Account(read, written, text or None)

    @contextlib.contextmanager
    def _alone(self, *, wait: bool) -> Iterator[bool]:
        """Hold the sums against other processes; yield whether that worked."""
        deadline = time.monotonic() + (_ADD_SECONDS if wait else 0)
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.0005)
        try:
            yield True
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Remove the file. Who has entered it finds out, who enters is told."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def close(self) -> None:
        """Close the file, and end the visit with it."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ActivityFiles:
    """All activity files, in ``directory``: ``ports.Activities``."""

    def __init__(self, directory: str, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._directory = directory
        self._now_ns = now_ns
        self._boot = boot_id()

    def find(self, owned: Owned, transfer_id: str, *, visit: bool) -> OpenActivity | None:
        """Open what is known of a transfer's use: see ``ports.Activities``."""
        while activity := self.find_hashed(owned, id_hash(transfer_id)):
            activity.begin(self._boot, transfer_id)
            if not visit:
                return activity
            is_closed = activity.is_closed
            if not is_closed and activity.enter():
                return activity
            activity.close()
            if is_closed:
                break
        return None

    def make(self, owned: Owned, transfer_id: str) -> OpenActivity:
        """Visit a transfer of which nothing need be known: see ``ports.Activities``."""
        name = f"{owned.value}-{id_hash(transfer_id)}"
        while True:
            fd = open_private(self._directory, name)
            activity = OpenActivity(os.path.join(self._directory, name), fd, self._now_ns)
            activity.begin(self._boot, transfer_id)
            if activity.enter():
                return activity
            activity.close()

    def prune(self, owned: Owned, is_known: Callable[[str], bool]) -> int:
        """Remove what is left of transfers that are known no more; return how many."""
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries]
        pruned = 0
        for name in names:
            prefix, _, digest = name.partition("-")
            activity = self.find_hashed(owned, digest) if prefix == owned.value else None
            if activity:
                with contextlib.closing(activity):
                    if activity.is_abandoned(self._boot, is_known):
                        activity.remove()
                        pruned += 1
        return pruned

    def find_hashed(self, owned: Owned, digest: str) -> OpenActivity | None:
        """Open what is known of the use of a transfer whose id has this hash."""
        path = os.path.join(self._directory, f"{owned.value}-{digest}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        return OpenActivity(path, fd, self._now_ns)
