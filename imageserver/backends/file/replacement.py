# SPDX-License-Identifier: Apache-2.0
"""Putting a new file in an old one's place, whole or not at all.

    O_TMPFILE --write--> fsync --linkat--> .imageserver-XXXX.part --rename--> image --fsync--> dir

Readers and disk see the old image or the new one, and whoever dies on the way leaves nothing
behind, but for the moment between linkat and the end; the next replacement in that directory
sweeps such a file, which is told from a live one by its lock. Where the file system has no
O_TMPFILE, the file has its name from the beginning.

Everything happens in a directory that is open already: ``directory`` is a descriptor that can
be read (``places``). What can fail is tried before the body is asked for: ``check_target``,
``NewFile`` and ``copy_attributes``. Behind the rename there is the directory's fsync alone; while
it runs the old file has a second name, from which it gets its own back (``old_kept``).
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from typing import Self

from imageserver.backends.descriptors import close_fd

_PREFIX = b".imageserver-"
_SUFFIX = b".part"
#: What could not be locked (NFS without lockd, some FUSE file systems) says so in its name.
_UNLOCKED = b".unlocked.part"
#: ... and counts as abandoned when nobody has written to it for so long.
_UNLOCKED_SECONDS = 86400.0
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_MODES = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}
#: A sweep that runs at the same moment may take a file before it is locked; not so often.
_ATTEMPTS = 10


class NewFile:
    """A file that gets its name when it is complete; gone otherwise."""

    def __init__(self, directory: int) -> None:
        """Make a file that only its owner may use, whatever the umask: see ``hide``.

        Raises:
            OSError: the directory does not allow it.
        """
        self._directory = directory
        self._name: bytes | None = None
        self._suffix = _SUFFIX
        self._proc = self.fd = -1
        try:
            self._make()
            self.hide()
        except BaseException:
            self.close()
            raise

    def hide(self) -> None:
        """Let nobody but the owner use the file, unless modes are the mount's alone (FAT)."""
        try:
            _set_mode(self.fd, 0o600)
        except OSError as exc:
            if exc.errno not in _NO_MODES:
                raise

    def _make(self) -> None:
        try:
            flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
            self.fd = os.open(b".", flags, 0o600, dir_fd=self._directory)
        except OSError as exc:
            if exc.errno not in _NO_TMPFILE:
                raise
            self._make_named()
        else:
            # open(2), O_TMPFILE: how a nameless file gets one without CAP_DAC_READ_SEARCH. With a
            # directory descriptor, for without one Python calls link(2), which follows nothing.
            self._proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            if not self._lock():
                self._suffix = _UNLOCKED

    def _make_named(self) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        for _ in range(_ATTEMPTS):
            name = self._new_name()
            self.fd = os.open(name, flags, 0o600, dir_fd=self._directory)
            self._name = name
            try:
                if not self._lock():
                    self._suffix = _UNLOCKED
                    unlocked = self._new_name()
                    self._rename(name, unlocked)
                    self._name = unlocked
                if _is(self.fd, self._name, self._directory):
                    return
            except (BlockingIOError, FileNotFoundError):
                pass
            fd, self.fd, self._name = self.fd, -1, None
            close_fd(fd)
        raise OSError(errno.EAGAIN, "new files vanish")

    def _lock(self) -> bool:
        """Tell this file from one whose writer died (``sweep``); False where there are no locks."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def _new_name(self) -> bytes:
        return _name(self._suffix)

    def rename(self, target: bytes) -> None:
        """Put the file in the target's place; a name in the same directory."""
        if self._name is None:
            name = self._new_name()
            os.link(
                *(b"%d" % self.fd, name),
                src_dir_fd=self._proc,
                dst_dir_fd=self._directory,
                follow_symlinks=True,
            )
            self._name = name
        self._rename(self._name, target)
        self._name = None

    def _rename(self, old: bytes, new: bytes) -> None:
        os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def close(self) -> None:
        """Remove what has not been renamed."""
        if self._name is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)
            self._name = None
        for fd in (self._proc, self.fd):
            if fd >= 0:
                close_fd(fd)
        self._proc = self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


@contextlib.contextmanager
def old_kept(directory: int, name: bytes, old: int, new: int) -> Iterator[None]:
    """Where the block fails after it has renamed ``new``, give ``name`` back to ``old``.

    Both are open files. ``old`` is -1 where there is none: then nothing has the name again.
    Where the file system has no hard links or locks, ``new`` stays.
    """
    kept = _second_name(directory, old)
    try:
        yield
    except OSError:
        # A disk that fails may fail here as well; the first error is the one to tell.
        with contextlib.suppress(OSError):
            if _is(new, name, directory):
                if kept:
                    os.rename(kept, name, src_dir_fd=directory, dst_dir_fd=directory)
                elif old < 0:
                    os.unlink(name, dir_fd=directory)
        raise
    finally:
        if kept:
            with contextlib.suppress(OSError):
                os.unlink(kept, dir_fd=directory)
            with contextlib.suppress(OSError):  # it is unlocked when it is closed, too
                fcntl.flock(old, fcntl.LOCK_UN)


def _second_name(directory: int, old: int) -> bytes | None:
    """Give a file another name, which no sweep removes while it is open; None if that fails."""
    if old < 0:
        return None
    name = _name(_SUFFIX)
    try:
        fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.link(b"/proc/self/fd/%d" % old, name, dst_dir_fd=directory, follow_symlinks=True)
    except OSError:
        return None
    return name


def _name(suffix: bytes) -> bytes:
    return _PREFIX + secrets.token_hex(8).encode() + suffix


def check_target(directory: int, name: bytes, old: int) -> None:
    """Prove that ``name``, open as ``old``, can be renamed over, changing nothing.

    Raises:
        OSError: it is a mount point, immutable, somebody else's in a sticky directory, ...
    """
    if _mount_of(old) != _mount_of(directory):
        raise OSError(errno.EBUSY, "is a mount point")
    with contextlib.suppress(NotADirectoryError, FileNotFoundError):
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "has become a directory")
        # rmdir(2) asks whether the name may be removed before it asks whether it is a directory.
        os.rmdir(name, dir_fd=directory)
        # An empty directory was put there since the stat. Its mode is not known: nobody but us.
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=directory)
        raise IsADirectoryError(errno.EISDIR, "has become a directory")


def _mount_of(fd: int) -> bytes:
    """Return the mount through which a file was opened (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        found = re.search(rb"^mnt_id:\s*([0-9]+)$", file.read(), re.MULTILINE)
    return found[1] if found else b""


def sweep(directory: int) -> None:
    """Remove what writers that died have left in ``directory``."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(directory, name)


def _remove_if_abandoned(directory: int, name: bytes) -> None:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        # NFS: an exclusive lock needs a descriptor that can be written to (flock(2)).
        fd = os.open(name, flags | os.O_RDWR, dir_fd=directory)
    except PermissionError:
        fd = os.open(name, flags | os.O_RDONLY, dir_fd=directory)
    try:
        if name.endswith(_UNLOCKED):
            is_abandoned = time.time() - os.fstat(fd).st_mtime > _UNLOCKED_SECONDS
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_abandoned = True
        if is_abandoned and _is(fd, name, directory):
            os.unlink(name, dir_fd=directory)
    finally:
        close_fd(fd)


def _is(fd: int, name: bytes, directory: int) -> bool:
    """Tell whether ``name`` is the file open as ``fd``."""
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    return os.path.samestat(os.fstat(fd), found)


def copy_attributes(old: int, new: int) -> None:
    """Make owner, mode and extended attributes (ACLs and labels among them) those of ``old``.

    What is right already is left alone: a label that comes from the mount, for one, cannot be set.

    Raises:
        OSError: one of them cannot be kept.
    """
    found = os.fstat(old)
    mine = os.fstat(new)
    if (found.st_uid, found.st_gid) != (mine.st_uid, mine.st_gid):
        os.fchown(new, found.st_uid, found.st_gid)
    wanted, has = _attributes(old), _attributes(new)
    for name, value in wanted.items():
        if has.get(name) != value:
            os.setxattr(new, name, value)
    for name in has.keys() - wanted.keys():  # such as an ACL that the directory gives
        if not name.startswith(b"security."):  # labels cannot be removed
            os.removexattr(new, name)
    _set_mode(new, stat.S_IMODE(found.st_mode))  # last: fchown clears set-id bits


def _set_mode(fd: int, mode: int) -> None:
    if stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        os.fchmod(fd, mode)


def _attributes(fd: int) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(fd)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return {}
        raise
    return {name: os.getxattr(fd, name) for name in map(os.fsencode, names)}
