# SPDX-License-Identifier: Apache-2.0
"""Image locks: one lock file per image, held through filelock, in a directory opened once.

The kernel drops a lock with its holder, however that dies. What the kernel cannot tell is
whether the holder was done: so a holder writes its name into the file as a mark, and takes it
away when it gives the image back with nothing left in flight. Who finds a mark knows that the dead
holder's last writes may still be on their way (``Lock.abandoned``). The mark also says whether the
holder has the lock for a moment only, to share the image, or as long as it has the image alone.

The file's name is a hash, for sockets, exports and paths exceed file names. Idle files are
pruned by ``prune``, under their own lock; who takes an unlinked file starts over.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable

from filelock import lock_descriptor, unlock_descriptor

from imageserver.core.errors import ImageBusy
from imageserver.core.kinds import Image
from imageserver.core.slots import Owner
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.private import own_files

#: How long a lock may outlive its holder: a thread in the middle of a write(2) ends with that.
_LAST_BREATH_SECONDS = 5.0
#: A mark is two numbers: see ``_mark``.
_MARK_SIZE = 64
#: A lock file nobody has touched for this long is pruned.
_IDLE_SECONDS = 3600.0
#: Those who share an image have its lock for half a millisecond each. So many may come at once
#: that one waits for seconds; longer only if a process is stopped with the lock in its hands.
_SHARE_SECONDS = 5.0
_BRIEF_STEP_SECONDS = 0.001


def image_key(image: Image) -> str:
    """Return the identity of an image, 32 hexadecimal digits: ids of one image share it."""
    parts = [image.kind.name.encode(), *image.identity()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


class ImageLock:
    """An image held by this request; made by ``ImageLocks.acquire``."""

    def __init__(self, directory: int, name: str, mark: bytes) -> None:
        """Take the lock, leaving ``mark`` in its file, which is made where it is missing.

        Raises:
            ImageBusy: somebody has it.
            FileNotFoundError: the directory was removed.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            while not self._is_taken():
                os.close(self._fd)  # pruned between the two calls
                self._fd = -1
                self._fd = os.open(name, flags, 0o600, dir_fd=directory)
            self.predecessor = os.pread(self._fd, _MARK_SIZE, 0)
            self.abandoned = self.predecessor != b""
            # In one go and over the old one, so that at no moment there is none.
            os.pwrite(self._fd, mark.ljust(_MARK_SIZE), 0)
        except BaseException:
            self._close()
            raise

    def _is_taken(self) -> bool:
        if not lock_descriptor(self._fd, blocking=False):
            raise ImageBusy
        return self.is_in_place()

    def is_in_place(self) -> bool:
        """Tell whether who comes next meets this lock; False: its file was removed."""
        return os.fstat(self._fd).st_nlink > 0

    def release(self, *, settled: bool) -> None:
        """Let the image go. Never fails, may be called twice."""
        if settled and self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                unlock_descriptor(fd)
            os.close(fd)


def _parsed(mark: bytes) -> tuple[Owner | None, bool]:
    """Return who left a mark, and whether to share the image."""
    fields = re.fullmatch(rb"([0-9]{1,10}) ([0-9]{1,20})( shared)? *", mark)
    if fields is None:
        return None, False
    return Owner(int(fields[1]), int(fields[2])), fields[3] is not None


class ImageLocks:
    """All image locks, one file each in ``directory``."""

    def __init__(
        self,
        directory: KeptDirectory,
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
            StateUnavailable: the directory was removed or replaced, or the lock file cannot be
                made, written or locked.
        """
        return self._acquire(image, shared=False, waits=False)

    def acquire_briefly(self, image: Image, *, shared: bool) -> ImageLock:
        """Take the lock, waiting for all who have it for a moment; not for one who has it alone.

        ``shared``: for a moment, too.

        Raises:
            ImageBusy: somebody has the image alone; or the lock was not to be had for seconds.
            StateUnavailable: see ``acquire``.
        """
        return self._acquire(image, shared=shared, waits=True)

    def _acquire(self, image: Image, *, shared: bool, waits: bool) -> ImageLock:
        name = image_key(image) + ".lock"
        deadline = time.monotonic() + max(_LAST_BREATH_SECONDS, _SHARE_SECONDS)
        with own_files("the lock files"):
            while True:
                try:
                    lock = self._take(name, shared=shared)
                except ImageBusy:
                    if time.monotonic() > deadline or not self._is_free_soon(name, waits=waits):
                        raise
                    time.sleep(_BRIEF_STEP_SECONDS)
                else:
                    self._await_end(lock, deadline)
                    return lock

    def _take(self, name: str, *, shared: bool) -> ImageLock:
        self._directory.require()
        return ImageLock(self._directory.fileno(), name, self._mark(shared=shared))

    def _await_end(self, lock: ImageLock, deadline: float) -> None:
        """Wait until whoever left a mark is quite gone.

        The kernel closes the files of a dying process one by one: its lock may go before the
        connection does on which its last writes are, and that must not look like a living one's.
        """
        owner, _ = _parsed(lock.predecessor)
        with contextlib.ExitStack() as held:
            held.callback(lock.release, settled=False)
            while owner and self._is_alive(owner) and self._is_leaving(owner):
                if time.monotonic() > deadline:
                    raise ImageBusy
                time.sleep(_BRIEF_STEP_SECONDS)
            held.pop_all()

    def _mark(self, *, shared: bool = False) -> bytes:
        me = self._me()
        return f"{me.pid} {me.start}{' shared' if shared else ''}".encode()

    def _is_free_soon(self, name: str, *, waits: bool) -> bool:
        """Tell whether the lock is worth waiting for.

        A dead holder's lock the kernel drops soon; one who shares the image gives it back soon.
        """
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(name, flags, dir_fd=self._directory.fileno()), "rb") as file:
                owner, shared = _parsed(file.read(_MARK_SIZE))
        except OSError:
            owner, shared = None, False
        if owner is None:
            return waits  # it has just been taken, or given back
        return (waits and shared) or self._is_leaving(owner)

    def prune(self) -> int:
        """Remove lock files that are idle and unmarked; return how many."""
        pruned = 0
        directory = self._directory.fileno()
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError, ImageBusy):
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                # The system's clock may have been set: then one that is idle is pruned at a later
                # start, or one that is not is asked for its lock.
                if time.time() - found.st_mtime < _IDLE_SECONDS or found.st_size:
                    continue
                lock = ImageLock(directory, name, self._mark())
                try:
                    if not lock.abandoned:  # nor has it been marked since it was listed
                        os.unlink(name, dir_fd=directory)
                        pruned += 1
                finally:
                    lock.release(settled=not lock.abandoned)
        return pruned
