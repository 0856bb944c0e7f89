# SPDX-License-Identifier: Apache-2.0
"""Image locks: one lock file per image, held through filelock, in a directory opened once.

The kernel drops a lock with its holder, however that dies. What the kernel cannot tell is
whether the holder's writes were complete. So the holder writes its pid and start time into the
file, as a mark, and removes the mark when it gives the image back with no write in flight. The
next holder that finds a mark knows that writes of the last one may still reach the image
(``ImageLock.abandoned``). The mark also says whether the holder has the lock for a moment only, to
share the image, or as long as it has the image alone.

The file's name is a hash, for sockets, exports and paths exceed file names. ``prune`` removes
idle files, under their own lock; a process that locks an unlinked file starts over.
"""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable
from functools import lru_cache

from filelock import lock_descriptor, unlock_descriptor

from imageserver.core.errors import ImageBusy
from imageserver.core.kinds import Image
from imageserver.core.slots import Owner
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.private import own_files
from imageserver.runtime.processes import EXIT_SECONDS

#: Bytes of a mark, which is two numbers and blanks: see ``_mark``.
_MARK_SIZE = 64
#: A lock file nobody has touched for this long is pruned.
_IDLE_SECONDS = 3600.0
#: Requests that share an image have its lock for half a millisecond each. So many may come at once
#: that one waits for seconds; longer only if a process is stopped while it holds the lock.
_SHARE_SECONDS = 5.0
_BRIEF_STEP_SECONDS = 0.001
_LOCK_FILES = own_files("the lock files")


def image_key(image: Image) -> str:
    """Return the identity of an image, 32 hexadecimal digits: ids of one image share it."""
    return _hashed(image.kind.name, *image.identity())


@lru_cache(4096)
def _hashed(kind: str, *identity: bytes) -> str:
    return hashlib.sha256(b"\0".join((kind.encode(), *identity))).hexdigest()[:32]


class ImageLock:
    """The lock of an image that this request holds; made by ``ImageLocks.acquire``."""

    def __init__(self, directory: KeptDirectory, name: str, mark: bytes) -> None:
        """Take the lock, leaving ``mark`` in its file, which is made where it is missing.

        Raises:
            ImageBusy: another request holds it.
            FileNotFoundError: the directory was removed.
        """
        self._directory = directory
        self._name = name
        self._fd = self._open()
        try:
            while not self._is_taken():
                os.close(self._fd)  # pruned between open(2) and flock(2)
                self._fd = -1
                self._fd = self._open()
            self.predecessor = os.pread(self._fd, _MARK_SIZE, 0)
            self.abandoned = self.predecessor != b""
            # One write(2) over the old mark, so that the file has a mark at every moment.
            os.pwrite(self._fd, mark.ljust(_MARK_SIZE), 0)
        except BaseException:
            self._close()
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(self._name, flags, 0o600, dir_fd=self._directory.fileno())

    def _is_taken(self) -> bool:
        if not lock_descriptor(self._fd, blocking=False):
            raise ImageBusy
        return self._is_named()

    def _is_named(self) -> bool:
        """Tell whether the file's name still leads to it, not to another file or none."""
        try:
            found = os.stat(self._name, dir_fd=self._directory.fileno(), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def is_in_place(self) -> bool:
        """Tell whether the next request would find this lock.

        False: its file, or the directory with it, was removed, renamed or replaced.
        """
        return self._directory.is_in_place() and self._is_named()

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
    """Return the process that left a mark, and whether it shares the image."""
    fields = re.fullmatch(rb"([0-9]{1,10}) ([0-9]{1,20})( shared)? *", mark)
    if fields is None:
        return None, False
    return Owner(int(fields[1]), int(fields[2])), fields[3] is not None


class ImageLocks:
    """All image locks, one file each in ``directory``."""

    def __init__(
        self,
        directory: KeptDirectory,
        is_exiting: Callable[[Owner], bool],
        me: Callable[[], Owner],
        is_alive: Callable[[Owner], bool] = lambda _: False,
    ) -> None:
        """``me`` names this process, in the marks it leaves."""
        self._directory = directory
        self._is_exiting = is_exiting
        self._is_alive = is_alive
        self._me = me

    def acquire(self, image: Image) -> ImageLock:
        """Take the image's lock.

        Raises:
            ImageBusy: another request holds it.
            StateUnavailable: the directory was removed or replaced, or the lock file cannot be
                made, written or locked.
        """
        return self._acquire(image, shared=False, waits=False)

    def acquire_briefly(self, image: Image, *, shared: bool) -> ImageLock:
        """Take the lock, waiting for requests that share the image; not for one that has it alone.

        ``shared``: this request shares the image, too.

        Raises:
            ImageBusy: another request has the image alone, or the lock was held for seconds.
            StateUnavailable: see ``acquire``.
        """
        return self._acquire(image, shared=shared, waits=True)

    def _acquire(self, image: Image, *, shared: bool, waits: bool) -> ImageLock:
        name = image_key(image) + ".lock"
        deadline = time.monotonic() + max(EXIT_SECONDS, _SHARE_SECONDS)
        with _LOCK_FILES:
            while True:
                try:
                    lock = self._take(name, shared=shared)
                except ImageBusy:
                    if time.monotonic() > deadline or not self._is_free_soon(name, waits=waits):
                        raise
                    time.sleep(_BRIEF_STEP_SECONDS)
                else:
                    self._await_exit(lock, deadline)
                    return lock

    def _take(self, name: str, *, shared: bool) -> ImageLock:
        self._directory.require()
        return ImageLock(self._directory, name, self._mark(shared=shared))

    def _await_exit(self, lock: ImageLock, deadline: float) -> None:
        """Wait until the process that left a mark has no thread and no file any more.

        The kernel closes the files of a killed process one by one: its lock may go before the
        connection on which its last writes are, which must not look like a living process's.
        """
        owner, _ = _parsed(lock.predecessor)
        with contextlib.ExitStack() as held:
            held.callback(lock.release, settled=False)
            while owner and self._is_alive(owner) and self._is_exiting(owner):
                if time.monotonic() > deadline:
                    raise ImageBusy
                time.sleep(_BRIEF_STEP_SECONDS)
            held.pop_all()

    def _mark(self, *, shared: bool = False) -> bytes:
        me = self._me()
        return f"{me.pid} {me.start}{' shared' if shared else ''}".encode()

    def _is_free_soon(self, name: str, *, waits: bool) -> bool:
        """Tell whether the lock is free in a moment: its holder exits, or shares the image."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(name, flags, dir_fd=self._directory.fileno()), "rb") as file:
                owner, shared = _parsed(file.read(_MARK_SIZE))
        except OSError:
            owner, shared = None, False
        if owner is None:
            return waits  # it was taken or given back a moment ago
        return (waits and shared) or self._is_exiting(owner)

    def prune(self) -> int:
        """Remove lock files that are idle and unmarked; return how many."""
        pruned = 0
        directory = self._directory.fileno()
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError, ImageBusy):
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                # Where the system's clock has been set, an idle file is pruned at a later start,
                # and one in use is kept by its lock.
                if time.time() - found.st_mtime < _IDLE_SECONDS or found.st_size:
                    continue
                lock = ImageLock(self._directory, name, self._mark())
                try:
                    if not lock.abandoned:  # it may have got a mark since it was listed
                        os.unlink(name, dir_fd=directory)
                        pruned += 1
                finally:
                    lock.release(settled=not lock.abandoned)
        return pruned
