# SPDX-License-Identifier: Apache-2.0
"""Private files: the runtime directory and what lies in it, ours alone or not used."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from imageserver.errors import StateFull, StateUnavailable

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


class UnusableDirectory(Exception):
    """The runtime directory cannot be trusted or used; ``str()`` is a sentence."""


def prepare_directory(path: str) -> None:
    """Make the runtime directory, or check that it is ours alone (mode 0700, no link).

    Raises:
        UnusableDirectory: it is not, or cannot be made.
    """
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
            os.chmod(path, 0o700)
            return
    except OSError as exc:
        raise UnusableDirectory(
            f"{path} cannot be made or used ({exc.strerror}); choose another"
        ) from exc
    raise UnusableDirectory(
        f"{path} is not a directory that belongs to uid {os.geteuid()}; remove it or choose another"
    )


def open_private(directory: str, name: str) -> int:
    """Open a file of the runtime directory for reading and writing, 0600, following no link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(os.path.join(directory, name), flags, 0o600)


@contextlib.contextmanager
def own_files(what: str) -> Iterator[None]:
    """Translate what the system says of the server's own files; ``what`` names them in a sentence.

    Raises:
        StateFull: there is no room for them.
        StateUnavailable: they cannot be opened, read, written or locked for another reason.
    """
    try:
        yield
    except OSError as exc:
        error = StateFull if exc.errno in _FULL else StateUnavailable
        raise error(f"{what} cannot be used now: {exc.strerror or exc}") from exc
