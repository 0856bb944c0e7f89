# SPDX-License-Identifier: Apache-2.0
"""Image locks: one lock file per image in the runtime directory, held through filelock.

The kernel drops a lock with its holder, however that dies. What the kernel cannot tell is
whether the holder was done: so a holder writes a mark into the file and takes it away when
it gives the image back with nothing left in flight. Who finds a mark knows that the dead
holder's last writes may still be on their way (``Lock.abandoned``).

The file's name is a hash, for sockets, exports and paths exceed file names. Idle files are
pruned by ``prune``, under their own lock; filelock notices an unlinked file and starts over.
"""

import contextlib
import hashlib
import os
import time

from filelock import FileLock, Timeout

from imageserver.errors import ImageBusy
from imageserver.transfers import FileImage, Image

_MARK = b"held"
#: A lock file nobody has touched for this long is pruned.
_IDLE_SECONDS = 3600.0


def image_key(image: Image) -> str:
    """Return the identity of an image, 32 hexadecimal digits: ids of one image share it."""
    if isinstance(image, FileImage):
        parts = ["file", os.path.realpath(image.path)]
    else:
        parts = ["nbd", os.path.realpath(image.socket), image.export]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


class ImageLock:
    """An image held by this request; made by ``ImageLocks.acquire``."""

    def __init__(self, path: str) -> None:
        # A fresh instance each time: an instance is re-entrant, which is no lock between
        # threads. thread_local off: a stream may be closed by another thread.
        self._lock = FileLock(
            path, mode=0o600, thread_local=False, fallback_to_soft=False, on_acquired=self._mark
        )
        self._fd = -1
        self.abandoned = False
        self._lock.acquire(blocking=False)

    def _mark(self, fd: int) -> None:
        self.abandoned = os.pread(fd, len(_MARK), 0) != b""
        os.pwrite(fd, _MARK, 0)
        self._fd = fd

    def release(self, *, settled: bool) -> None:
        """Let the image go. Never fails, may be called twice."""
        if self._lock.is_locked:
            if settled:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, 0)
            self._lock.release()


class ImageLocks:
    """All image locks, one file each in ``directory``."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def acquire(self, image: Image) -> ImageLock:
        """Take the image's lock.

        Raises:
            ImageBusy: somebody holds it.
        """
        try:
            return ImageLock(os.path.join(self._directory, image_key(image) + ".lock"))
        except Timeout as exc:
            raise ImageBusy from exc

    def prune(self) -> int:
        """Remove lock files that are idle and unmarked; return how many."""
        pruned = 0
        for entry in os.scandir(self._directory):
            with contextlib.suppress(FileNotFoundError, Timeout):
                found = entry.stat(follow_symlinks=False)
                if time.time() - found.st_mtime < _IDLE_SECONDS or found.st_size:
                    continue
                lock = ImageLock(entry.path)
                try:
                    os.unlink(entry.path)
                    pruned += 1
                finally:
                    lock.release(settled=True)
        return pruned
