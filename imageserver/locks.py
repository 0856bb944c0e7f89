# SPDX-License-Identifier: Apache-2.0
"""Image locks: one lock file per image in the runtime directory, held through filelock.

The kernel drops a lock with its holder, however that dies. What the kernel cannot tell is
whether the holder was done: so a holder writes its name into the file as a mark, and takes it
away when it gives the image back with nothing left in flight. Who finds a mark knows that the dead
holder's last writes may still be on their way (``Lock.abandoned``).

The file's name is a hash, for sockets, exports and paths exceed file names. Idle files are
pruned by ``prune``, under their own lock; filelock notices an unlinked file and starts over.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable

from filelock import FileLock, Timeout

from imageserver.errors import ImageBusy
from imageserver.private import own_files
from imageserver.slots import Owner
from imageserver.transfers import FileImage, Image, path_bytes

#: How long a lock may outlive its holder: a thread in the middle of a write(2) ends with that.
_LAST_BREATH_SECONDS = 5.0
#: A mark is two numbers: see ``_mark``.
_MARK_SIZE = 64
#: A lock file nobody has touched for this long is pruned.
_IDLE_SECONDS = 3600.0
#: Who shares an image's lock has it for half a millisecond.
_BRIEF_SECONDS = 0.2
_BRIEF_STEP_SECONDS = 0.001


def image_key(image: Image) -> str:
    """Return the identity of an image, 32 hexadecimal digits: ids of one image share it."""
    if isinstance(image, FileImage):
        parts = [b"file", os.path.realpath(path_bytes(image.path))]
    else:
        parts = [b"nbd", os.path.realpath(path_bytes(image.socket)), image.export.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


class ImageLock:
    """An image held by this request; made by ``ImageLocks.acquire``."""

    def __init__(self, path: str, mark: bytes) -> None:
        """Take the lock, leaving ``mark`` in its file.

        Raises:
            Timeout: somebody has it.
        """
        self._mark = mark
        # A fresh instance each time: an instance is re-entrant, which is no lock between
        # threads. thread_local off: a stream may be closed by another thread.
        self._lock = FileLock(
            path,
            mode=0o600,
            thread_local=False,
            fallback_to_soft=False,
            on_acquired=self._leave_mark,
        )
        self._fd = -1
        self.abandoned = False
        self.predecessor = b""
        self._lock.acquire(blocking=False)

    def _leave_mark(self, fd: int) -> None:
        self.predecessor = os.pread(fd, _MARK_SIZE, 0)
        self.abandoned = self.predecessor != b""
        # In one go and over the old one, so that at no moment there is none.
        os.pwrite(fd, self._mark.ljust(_MARK_SIZE), 0)
        self._fd = fd

    def release(self, *, settled: bool) -> None:
        """Let the image go. Never fails, may be called twice."""
        if self._lock.is_locked:
            if settled:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, 0)
            self._lock.release()


def _owner_in(mark: bytes) -> Owner | None:
    fields = re.fullmatch(rb"([0-9]{1,10}) ([0-9]{1,20}) *", mark)
    return Owner(int(fields[1]), int(fields[2])) if fields else None


class ImageLocks:
    """All image locks, one file each in ``directory``."""

    def __init__(
        self,
        directory: str,
        is_leaving: Callable[[Owner], bool],
        me: Callable[[], Owner],
        is_alive: Callable[[Owner], bool] = lambda _: False,
    ) -> None:
        """``me`` names this process, in the marks it leaves."""
        self._directory = directory
        self._is_leaving = is_leaving
        self._is_alive = is_alive
        self._me = me

    def acquire(self, image: Image) -> ImageLock:
        """Take the image's lock.

        Raises:
            ImageBusy: somebody holds it.
            StateUnavailable: the lock file cannot be made, written or locked.
        """
        path = os.path.join(self._directory, image_key(image) + ".lock")
        with own_files("the lock files"):
            return self._acquire(path)

    def _acquire(self, path: str) -> ImageLock:
        deadline = time.monotonic() + _LAST_BREATH_SECONDS
        while True:
            try:
                lock = ImageLock(path, self._mark())
            except Timeout as exc:
                if self._is_held_by_the_living(path) or time.monotonic() > deadline:
                    raise ImageBusy from exc
                time.sleep(_BRIEF_STEP_SECONDS)
            else:
                self._await_end(lock, deadline)
                return lock

    def _await_end(self, lock: ImageLock, deadline: float) -> None:
        """Wait until whoever left a mark is quite gone.

        The kernel closes the files of a dying process one by one: its lock may go before the
        connection does on which its last writes are, and that must not look like a living one's.
        """
        owner = _owner_in(lock.predecessor)
        with contextlib.ExitStack() as held:
            held.callback(lock.release, settled=False)
            while owner and self._is_alive(owner) and self._is_leaving(owner):
                if time.monotonic() > deadline:
                    raise ImageBusy
                time.sleep(_BRIEF_STEP_SECONDS)
            held.pop_all()

    def _mark(self) -> bytes:
        me = self._me()
        return f"{me.pid} {me.start}".encode()

    def _is_held_by_the_living(self, path: str) -> bool:
        """Tell whether the holder is to be believed; the kernel drops a dead one's lock soon."""
        try:
            with open(path, "rb") as file:
                owner = _owner_in(file.read(_MARK_SIZE))
        except OSError:
            owner = None
        # Without a mark it has just been taken, or given back.
        return owner is None or not self._is_leaving(owner)

    def acquire_briefly(self, image: Image) -> ImageLock:
        """Take the image's lock for a moment, waiting as long for others who do the same.

        Raises:
            ImageBusy: somebody has it for longer.
        """
        deadline = time.monotonic() + _BRIEF_SECONDS
        while True:
            try:
                return self.acquire(image)
            except ImageBusy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_BRIEF_STEP_SECONDS)

    def prune(self) -> int:
        """Remove lock files that are idle and unmarked; return how many."""
        pruned = 0
        for entry in os.scandir(self._directory):
            with contextlib.suppress(FileNotFoundError, Timeout):
                found = entry.stat(follow_symlinks=False)
                if time.time() - found.st_mtime < _IDLE_SECONDS or found.st_size:
                    continue
                lock = ImageLock(entry.path, self._mark())
                try:
                    if not lock.abandoned:  # nor has it been marked since it was listed
                        os.unlink(entry.path)
                        pruned += 1
                finally:
                    lock.release(settled=not lock.abandoned)
        return pruned
