# SPDX-License-Identifier: Apache-2.0
"""Putting a new file in an old one's place, whole or not at all.

    O_TMPFILE --write--> fsync --linkat--> .imageserver-XXXX.part --rename--> image --fsync--> dir

Readers and disk see the old image or the new one, and whoever dies on the way leaves nothing
behind, but for the moment between linkat and rename; the next replacement in that directory
sweeps such a file, which is told from a live one by its lock. Where the file system has no
O_TMPFILE, the file has its name from the beginning.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from typing import Self

_PREFIX = ".imageserver-"
_SUFFIX = ".part"
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}


class NewFile:
    """A file that gets its name when it is complete; gone otherwise."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._name: str | None = None
        try:
            self.fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            if exc.errno not in _NO_TMPFILE:
                raise
            self._name = self._new_name()
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(self._name, flags, 0o600)
        # Tells this file from one whose writer died: see sweep.
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _new_name(self) -> str:
        return os.path.join(self._directory, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")

    def rename(self, target: str) -> None:
        """Put the file in the target's place, and that on disk."""
        if self._name is None:
            name = self._new_name()
            # open(2), O_TMPFILE: how a nameless file gets one without CAP_DAC_READ_SEARCH. With a
            # directory descriptor, for without one Python calls link(2), which follows nothing.
            proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.link(str(self.fd), name, src_dir_fd=proc, follow_symlinks=True)
            finally:
                os.close(proc)
            self._name = name
        os.rename(self._name, target)
        self._name = None
        sync_directory(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._name is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._name)
        os.close(self.fd)


def sweep(directory: str) -> None:
    """Remove what writers that died have left in ``directory``."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                os.unlink(path)
        finally:
            os.close(fd)


def copy_attributes(old: int, new: int) -> None:
    """Carry owner, mode and extended attributes (ACLs and labels among them) over."""
    found = os.fstat(old)
    mine = os.fstat(new)
    if (found.st_uid, found.st_gid) != (mine.st_uid, mine.st_gid):
        os.fchown(new, found.st_uid, found.st_gid)
    for name in _attributes(old):
        os.setxattr(new, name, os.getxattr(old, name))
    os.fchmod(new, stat.S_IMODE(found.st_mode))  # last: fchown clears set-id bits


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise


def sync_directory(path: str) -> None:
    """Bring the names in a directory to stable storage (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
