# SPDX-License-Identifier: Apache-2.0
"""Image locks: one lock file per image, held through filelock, in a directory opened once.

The kernel drops a lock with its holder, however that dies. What the kernel cannot tell is
whether the holder's writes were complete. The slot table can: it counts those who may have left
a write under way (``slots.Deaths``). Up to which count such writes have been waited for is noted

    in this process's memory        which is asked first
    in the lock file                "settled COUNT", for other processes, once somebody has waited
    by an empty or missing file     nobody has had to wait: settled up to the table's first count

Whatever else the file says, such as the mark of an older version, means: look (``is_settled``).

The file's name is a hash, for sockets, exports and paths exceed file names. ``prune`` removes
idle files, under their own lock; a process that locks an unlinked file starts over.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from functools import lru_cache

from filelock import lock_descriptor, unlock_descriptor

from imageserver.core.errors import ImageBusy
from imageserver.core.kinds import Image
from imageserver.core.slots import Deaths
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.flock import steps
from imageserver.runtime.private import close_fd, unusable
from imageserver.runtime.processes import EXIT_SECONDS

#: Bytes of a note, which is padded: an older version's mark may be that long.
_NOTE_SIZE = 64
#: Images whose notes a process remembers.
_MOST_NOTED = 4096
#: A lock file that has been there for this long is pruned.
_IDLE_SECONDS = 3600.0
#: Requests that share an image have its lock for half a millisecond each. So many may come at once
#: that one waits for seconds; longer only if a process is stopped while it holds the lock.
_SHARE_SECONDS = 5.0
_BRIEF_STEP_SECONDS = 0.001
_SETTLED = b"settled "
_SUFFIX = ".lock"
_WHAT = "the lock files"


def image_key(image: Image) -> str:
    """Return the identity of an image, 32 hexadecimal digits: ids of one image share it."""
    return _hashed(image.kind.backend, *image.identity())


@lru_cache(4096)
def _hashed(backend: str, *identity: bytes) -> str:
    return hashlib.sha256(b"\0".join((backend.encode(), *identity))).hexdigest()[:32]


class ImageLock:
    """The lock of an image that this request holds; made by ``ImageLocks.acquire``."""

    def __init__(self, directory: KeptDirectory, name: str, noted: dict[str, int]) -> None:
        """Take the lock in its file, which is made where it is missing.

        Raises:
            ImageBusy: another request holds it.
            FileNotFoundError: the directory was removed.
        """
        self._directory = directory
        self._name = name
        self._noted = noted
        self._fd = self._open()
        try:
            while not self._is_taken():
                self.release()  # pruned between open(2) and flock(2)
                self._fd = self._open()
        except BaseException:
            self.release()
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._name, flags, 0o600, dir_fd=self._directory.fileno())

    def _is_taken(self) -> bool:
        """Lock the file; False: its name leads to another one by now, or to none."""
        if not lock_descriptor(self._fd, blocking=False):
            raise ImageBusy
        try:
            found = os.lstat(self._name, dir_fd=self._directory.fileno())
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def is_settled(self, deaths: Deaths) -> bool:
        """Tell whether all writes of those who had the image, and have died, are known to be done.

        ``deaths``: as they were when the image was claimed, under this lock.

        Raises:
            StateUnavailable: the file cannot be read.
        """
        if self._noted.get(self._name) == deaths.count:
            return True
        text = self._note()
        if text != _settled(deaths.count) and (text or deaths.first != deaths.count):
            return False
        self._remember(deaths.count)
        return True

    def settle(self, deaths: Deaths) -> None:
        """Note that they have been waited for. Never fails: then the next process looks again."""
        self._remember(deaths.count)
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, _settled(deaths.count).ljust(_NOTE_SIZE), 0)

    def may_be_pruned(self) -> bool:
        """Tell whether the file says no more than a missing one, or less."""
        text = self._note()
        return not text or text.startswith(_SETTLED)

    def _note(self) -> bytes:
        try:
            return os.pread(self._fd, _NOTE_SIZE, 0).rstrip()
        except OSError as exc:
            raise unusable(_WHAT, exc) from exc

    def _remember(self, count: int) -> None:
        if len(self._noted) >= _MOST_NOTED:
            self._noted.clear()
        self._noted[self._name] = count

    def release(self) -> None:
        """Let the image go. Never fails, may be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                unlock_descriptor(fd)
            close_fd(fd)


def _settled(count: int) -> bytes:
    return _SETTLED + b"%016x" % count


class ImageLocks:
    """All image locks, one file each in ``directory``."""

    def __init__(self, directory: KeptDirectory, gives_way: Callable[..., bool]) -> None:
        """``gives_way``: see ``SharedTable``, where the image's holders are."""
        self._directory = directory
        self._gives_way = gives_way
        self._noted: dict[str, int] = {}

    def acquire(self, image: Image) -> ImageLock:
        """Take the image's lock; wait only for a holder that dies.

        Raises:
            ImageBusy: another request holds it.
            StateUnavailable: the directory was removed or replaced, or the lock file cannot be
                made or locked.
        """
        return self._acquire(image_key(image), waits=False)

    def acquire_briefly(self, image: Image) -> ImageLock:
        """Take the lock, waiting for requests that share the image; not for one that has it alone.

        Raises:
            ImageBusy: another request has the image alone, or the lock was held for seconds.
            StateUnavailable: see ``acquire``.
        """
        return self._acquire(image_key(image), waits=True)

    def settled_at(self, image: Image) -> int | None:
        """Return the count of deaths up to which an image was settled: see ``ports.Locks``.

        Raises:
            StateUnavailable: the directory was removed or replaced.
        """
        self._directory.require()
        return self._noted.get(image_key(image) + _SUFFIX)

    def _acquire(self, key: str, *, waits: bool) -> ImageLock:
        deadline = 0.0
        for step in steps(_BRIEF_STEP_SECONDS):
            self._directory.require()
            try:
                return ImageLock(self._directory, key + _SUFFIX, self._noted)
            except OSError as exc:
                raise unusable(_WHAT, exc) from exc
            except ImageBusy:
                deadline = deadline or time.monotonic() + max(EXIT_SECONDS, _SHARE_SECONDS)
                if time.monotonic() > deadline or not self._gives_way(key, to_sharers=waits):
                    raise
            time.sleep(step)
        raise AssertionError  # steps never end

    def prune(self) -> int:
        """Remove lock files that are idle and say nothing; return how many."""
        pruned = 0
        directory = self._directory.fileno()
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError, ImageBusy):
                found = os.lstat(name, dir_fd=directory)
                # Where the system's clock has been set, an idle file is pruned at a later start,
                # and one in use is kept by its lock.
                if time.time() - found.st_mtime < _IDLE_SECONDS:
                    continue
                lock = ImageLock(self._directory, name, {})
                try:
                    if lock.may_be_pruned():
                        os.unlink(name, dir_fd=directory)
                        pruned += 1
                finally:
                    lock.release()
        return pruned
