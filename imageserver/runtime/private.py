# SPDX-License-Identifier: Apache-2.0
"""Private files: the runtime directory and its files, which nobody but the server's user may use.

The server changes no directory that it has not made: one with other owners or modes is refused.
"""

import contextlib
import errno
import os
import stat

from imageserver.core.errors import NO_DESCRIPTOR, Exhausted, StateFull, StateUnavailable

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
SUBDIRECTORIES = ("locks", "registered", "activity", "metrics")
#: What every runtime directory of ours has, whichever version has made it.
_SIGN = "slots.use"
#: What the server has in there.
OURS = {*SUBDIRECTORIES, _SIGN, "slots", "slots.new", "registered.lock"}
_MODE = 0o700


class UnusableDirectory(Exception):
    """The runtime directory cannot be trusted or used; ``str()`` is a sentence."""


def examine_directory(path: str) -> bool:
    """Tell whether a private directory is there; False: it can be made. Changes nothing.

    Raises:
        UnusableDirectory: it is not ours alone (mode 0700, no link), or cannot be made.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        _try_file(os.path.dirname(path) or "/", path, 0)
        return False
    except OSError as exc:
        raise _unusable(path, exc) from exc
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UnusableDirectory(
            f"{path} is not a directory that belongs to uid {os.geteuid()}; "
            "remove it or choose another"
        )
    if found.st_mode & 0o777 != _MODE:
        raise UnusableDirectory(
            f"{path} has mode {stat.S_IMODE(found.st_mode):04o}, not 0700, and is left as it is; "
            "choose a directory of the server's own"
        )
    return True


def examine_runtime(path: str, size: int) -> None:
    """Prove that a runtime directory can be made or used. Changes nothing.

    ``size``: bytes that are wanted for its table, where that is not there yet.

    Raises:
        UnusableDirectory: it is none of ours and not empty, or full, or see above.
    """
    if not examine_directory(path):
        _try_file(os.path.dirname(path) or "/", path, size)
        return
    try:
        names = set(os.listdir(path))
    except OSError as exc:
        raise _unusable(path, exc) from exc
    foreign = sorted(names - OURS)
    if foreign and _SIGN not in names:
        raise UnusableDirectory(
            f"{path} holds what is none of this server's ({foreign[0]}); "
            "choose a directory that is empty, or not there yet"
        )
    for name in SUBDIRECTORIES:
        examine_directory(os.path.join(path, name))
    _try_file(path, path, 0 if "slots" in names else size)


def prepare_directory(path: str) -> None:
    """Make a private directory where there is none, or check that it is ours alone.

    Raises:
        UnusableDirectory: it is not, or cannot be made.
    """
    if examine_directory(path):
        return
    try:
        os.mkdir(path, _MODE)
        os.chmod(path, _MODE)  # whatever the umask is
    except FileExistsError:
        examine_directory(path)  # another process was quicker
    except OSError as exc:
        raise _unusable(path, exc) from exc


def _try_file(directory: str, path: str, size: int) -> None:
    """Make a nameless file of ``size`` bytes where ``path`` is to be, and drop it.

    Raises:
        UnusableDirectory: that does not work.
    """
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        lacks_such_files = exc.errno in {errno.EOPNOTSUPP, errno.EISDIR}
        if lacks_such_files and os.statvfs(directory).f_blocks:  # /proc has none
            return  # making the table will tell
        raise _unusable(path, exc) from exc
    try:
        if size:
            os.posix_fallocate(fd, 0, size)
    except OSError as exc:
        raise _unusable(path, exc) from exc
    finally:
        close_fd(fd)


def _unusable(path: str, exc: OSError) -> UnusableDirectory:
    return UnusableDirectory(f"{path} cannot be made or used ({exc.strerror}); choose another")


def is_at(path: str, opened: os.stat_result) -> bool:
    """Tell whether a path leads, by no link, to the file that was opened: one stat(2)."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), opened)
    except OSError:
        return False


def close_fd(fd: int) -> None:
    """Close a descriptor. Never fails: Linux has closed it, whatever close(2) says.

    So what is given back after it is given back, too.
    """
    try:  # noqa: SIM105 - quicker than contextlib.suppress, several times a request
        os.close(fd)
    except OSError:
        pass


def open_private(directory: str, name: str) -> int:
    """Open a file of the runtime directory for reading and writing, 0600, following no link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(os.path.join(directory, name), flags, 0o600)


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` to a file that was opened just now."""
    while data:
        data = data[os.write(fd, data) :]


def read_regular(path: str, most: int) -> bytes | None:
    """Return a file's first ``most`` bytes; None where this is a link, or no regular file."""
    # O_NONBLOCK: a FIFO must not block before fstat(2) has told what it is.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            return None
        raise
    try:
        return os.read(fd, most) if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        close_fd(fd)


class own_files(contextlib.ContextDecorator):  # noqa: N801 - used as a statement
    """Translate the system's errors about the server's own files. Has no state: use it again.

    Raises:
        StateFull: there is no room for them.
        Exhausted: no descriptor is free.
        StateUnavailable: they cannot be opened, read, written or locked for another reason.
    """

    def __init__(self, what: str) -> None:
        """``what`` names the files in the error's sentence."""
        self._what = what

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, _cls: object, exc: BaseException | None, _traceback: object) -> None:
        """Translate an error of the system; others pass."""
        if isinstance(exc, OSError):
            raise unusable(self._what, exc) from exc


def unusable(what: str, exc: OSError) -> StateUnavailable:
    """Return the error that an error of the system about the server's own files is."""
    error: type[StateUnavailable] = StateUnavailable
    if exc.errno in _FULL:
        error = StateFull
    elif exc.errno in NO_DESCRIPTOR:
        error = Exhausted
    return error(f"{what} cannot be used now: {exc.strerror or exc}")
