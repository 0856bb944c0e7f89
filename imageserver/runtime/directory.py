# SPDX-License-Identifier: Apache-2.0
"""The runtime directory as a server has it: opened once, and known by its inode from then on.

    path          opened and locked, shared (flock(2)), so that no cleaner removes it for its age
    path/locks    and the other ``SUBDIRECTORIES``: the same
    path/slots    kept open: a child opens the file it has inherited, whatever is at the path now

A running server never makes a directory again that was removed or replaced: its processes would
have locks and slots in two places.
"""

import contextlib
import fcntl
import logging
import os
import threading
from functools import cache

from imageserver.core.errors import StateUnavailable
from imageserver.runtime.flock import wait_flock
from imageserver.runtime.pathclaim import PathClaim
from imageserver.runtime.private import (
    SUBDIRECTORIES,
    UnusableDirectory,
    close_fd,
    is_at,
    prepare_directory,
)

log = logging.getLogger(__name__)

#: systemd-tmpfiles locks a directory exclusively for as long as it looks through it.
_HOLD_SECONDS = 2.0


class KeptDirectory:
    """A directory that is opened at first use. A forked child goes on with its parent's."""

    def __init__(self, path: str) -> None:
        """Name the directory."""
        self.path = path
        self._fd = -1
        self._opened: os.stat_result | None = None
        self._opening = threading.Lock()

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            StateUnavailable: there was no directory when it was first asked for.
        """
        if self._fd < 0:
            with self._opening:
                if self._fd < 0:
                    self._open()
        return self._fd

    def _open(self) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self.path, flags)
        except OSError as exc:
            raise StateUnavailable(f"{self.path} cannot be opened: {exc.strerror}") from exc
        try:
            self._opened = os.fstat(fd)
        except OSError as exc:
            close_fd(fd)
            raise StateUnavailable(f"{self.path} cannot be used: {exc.strerror}") from exc
        self._fd = fd

    def hold(self) -> None:
        """Open the directory and lock it, shared, against cleaners; wait for one at work.

        Raises:
            StateUnavailable: it cannot be opened.
        """
        wait_flock(self.fileno(), _HOLD_SECONDS, fcntl.LOCK_SH)  # then without the lock

    def is_in_place(self) -> bool:
        """Tell whether the path still leads to the directory that was opened: one stat(2)."""
        if self._opened is None:
            with contextlib.suppress(StateUnavailable):
                self.fileno()
        return self._opened is not None and is_at(self.path, self._opened)

    def require(self) -> None:
        """Prove that it is in place.

        Raises:
            StateUnavailable: it was removed, or another one is there.
        """
        if not self.is_in_place():
            raise StateUnavailable(f"{self.path} was removed or replaced")

    def close(self) -> None:
        """Let the directory go. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)


class RuntimeDirectory:
    """The runtime directory as a server has it: ``runtime_in`` has the one of this process."""

    def __init__(self, path: str) -> None:
        """Name the directory; it is opened at first use, or by ``prepare``."""
        self.path = path
        self.top = KeptDirectory(path)
        self.locks, self.registered, self.activity, self.metrics = (
            KeptDirectory(os.path.join(path, name)) for name in SUBDIRECTORIES
        )
        self._kept = (self.top, self.locks, self.registered, self.activity, self.metrics)
        self._files: dict[str, int] = {}
        self._told = ""
        #: By which the next server knows that this one lives, should the directory be lost.
        self.claim = PathClaim(path)

    def prepare(self) -> None:
        """Make what is missing, open everything, and keep cleaners away.

        Raises:
            UnusableDirectory: the directory, or one in it, is not ours alone.
        """
        prepare_directory(self.path)
        for name in SUBDIRECTORIES:
            prepare_directory(os.path.join(self.path, name))
        try:
            for directory in self._kept:
                directory.hold()
        except StateUnavailable as exc:
            raise UnusableDirectory(f"{exc}; choose another") from exc

    def keep(self, name: str, fd: int) -> None:
        """Take over the descriptor of a file in it, for this process and its children."""
        self._files[name] = fd

    def kept(self, name: str) -> int:
        """Return the descriptor of a file that is kept; children share its locks."""
        return self._files[name]

    def reopen(self, name: str) -> int | None:
        """Open a file that is kept anew, with locks of its own; None where it is not kept."""
        fd = self._files.get(name)
        return None if fd is None else os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    def problem(self) -> str:
        """Say which directory was removed or replaced since; "": none that matters."""
        needed = (kept for kept in self._kept if kept is not self.metrics)
        lost = [directory.path for directory in needed if not directory.is_in_place()]
        return f"{lost[0]} was removed or replaced" if lost else ""

    def _is_table_in_place(self) -> bool:
        fd = self._files.get("slots")
        return fd is None or is_at(os.path.join(self.path, "slots"), os.fstat(fd))

    def require_records(self) -> None:
        """Prove that what is known of transfers is what other processes know.

        Raises:
            StateUnavailable: it was removed, or replaced.
        """
        self.registered.require()
        self.activity.require()

    def watch(self) -> None:
        """Log, once per change, that the directory is lost or back. For one thread.

        Claim its path, too, where the server that had it before has ended.
        """
        self.claim.take()
        problem = self.problem()
        if not problem and not self._is_table_in_place():
            problem = f"the table in {self.path} was removed or replaced"
        if problem and problem != self._told:
            log.error(
                "runtime directory: %s; what needs a lock or a slot is refused (503) until "
                "it is back, or the server is restarted",
                problem,
            )
        elif self._told and not problem:
            log.warning("runtime directory: %s is in place again", self.path)
        self._told = problem

    def close(self) -> None:
        """Let everything go. May be called twice."""
        files, self._files = self._files, {}
        for fd in files.values():
            close_fd(fd)
        for directory in self._kept:
            directory.close()
        self.claim.close()


#: One for each path and process: what the master has opened, its children inherit.
runtime_in = cache(RuntimeDirectory)
