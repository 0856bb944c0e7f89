# SPDX-License-Identifier: Apache-2.0
"""Locks of files: a file is written by one download only, and by none while one reads it.

A lock belongs to the file, not to its name. The name may lead to another file by the time the
lock is held, so it is checked again.
"""

import contextlib
import fcntl
import os
import stat
from collections.abc import Callable, Iterator

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import local_errors, opened


class LockedFile:
    """A file that this download alone writes; the descriptor holds its lock."""

    def __init__(self, path: str, fd: int, *, is_part: bool) -> None:
        self._path, self._fd, self._is_part = path, fd, is_part
        self._mode: int | None = None
        #: Identifies the file when it is opened once more.
        self.file = os.fstat(fd)

    def be_as_private_as(self, path: str) -> None:
        """Take over mode and owner of a file that this one is to replace, if there is one.

        Until ``be_as_before``, its owner may write it.
        """
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return
        with local_errors(self._path):
            with contextlib.suppress(PermissionError):
                os.fchown(self._fd, found.st_uid, found.st_gid)
            self._mode = stat.S_IMODE(found.st_mode) & 0o777
            os.fchmod(self._fd, self._mode | stat.S_IRUSR | stat.S_IWUSR)

    def be_as_before(self) -> None:
        """Have just the mode of the file that this one replaces, if there was one."""
        if self._mode is not None:
            with local_errors(self._path):
                os.fchmod(self._fd, self._mode)

    def require(self) -> None:
        """Require the path to lead to this file still.

        Raises:
            LocalFailure: it leads to another one.
        """
        with local_errors(self._path):
            if not _is_at(self._fd, self._path, is_part=self._is_part):
                raise LocalFailure(f"{self._path} was replaced by another file meanwhile")


@contextlib.contextmanager
def claimed(path: str, *, is_part: bool) -> Iterator[LockedFile]:
    """Lock a file against other downloads.

    A part is made if there is none, and removed again if nothing was written to it.
    """
    fd = _locked(path, is_part=is_part)
    try:
        yield LockedFile(path, fd, is_part=is_part)
    except BaseException:
        if is_part:
            _remove_empty(fd, path)
        raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def unchanged(path: str) -> Iterator[Callable[[], bool]]:
    """Lock a file against downloads into it; yields a function that tells whether it changed."""
    fd = opened(path, os.O_RDONLY)
    try:
        with local_errors(path):
            _lock(fd, path, fcntl.LOCK_SH)
            before = os.fstat(fd)

        def is_same() -> bool:
            with local_errors(path):
                now = os.stat(path)
            return os.path.samestat(before, now) and (before.st_size, before.st_mtime_ns) == (
                now.st_size,
                now.st_mtime_ns,
            )

        yield is_same
    finally:
        os.close(fd)


def _lock(fd: int, path: str, how: int) -> None:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise LocalFailure(f"{path}: another download of this file is running") from exc
    except OSError as exc:  # such as NFS without its lock service
        reason = exc.strerror or str(exc)
        raise LocalFailure(f"{path} cannot be locked where it lies: {reason}") from exc


def _remove_empty(fd: int, path: str) -> None:
    """Remove a part to which nothing was written."""
    with contextlib.suppress(OSError):
        if not os.fstat(fd).st_size and _is_at(fd, path, is_part=True):
            os.unlink(path)


def _locked(path: str, *, is_part: bool) -> int:
    """Open and lock the file at ``path``; again if another one is there once the lock is held."""
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_NOFOLLOW if is_part else 0)
    while True:
        if is_part and os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise LocalFailure(f"{path} is no regular file: remove it first")
        with local_errors(path):
            fd = os.open(path, flags, 0o666)
        try:
            _lock(fd, path, fcntl.LOCK_EX)
            if _is_at(fd, path, is_part=is_part):
                return fd
        except FileNotFoundError:
            pass
        except BaseException as exc:
            is_taken = isinstance(exc.__cause__, BlockingIOError)  # by another download
            if is_part and not is_taken:
                _remove_empty(fd, path)
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: str, *, is_part: bool) -> bool:
    return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=not is_part))
