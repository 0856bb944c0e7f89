# SPDX-License-Identifier: Apache-2.0
"""Which file a process counts in: its number, the lowest that no other process has.

    metrics/N               locked by the process that has number N (flock(2)); the kernel unlocks
    metrics/counter_N.db    what N counted, its dead predecessors included
    metrics/NAME_N.json     what else is told of N (``recent.py``)
    metrics/guard           held while a number is taken, or files are removed

A worker that goes on where a dead one has stopped keeps its counts, and there are never more
files than processes have lived at once: named after a pid, they would pile up with each reload.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from imageserver.core.errors import NO_DESCRIPTOR, StateUnavailable
from imageserver.observability.metrics.layout import (
    SIZE,
    Counts,
    DamagedFile,
    OtherLayout,
    parse_counts,
)
from imageserver.runtime.directory import runtime_in
from imageserver.runtime.flock import try_flock
from imageserver.runtime.guard import guarded
from imageserver.runtime.private import (
    UnusableDirectory,
    close_fd,
    open_private,
    prepare_directory,
    read_regular,
)

log = logging.getLogger(__name__)

_GUARD = "guard"
#: The guard is held for milliseconds. Only a process stopped inside it can make us wait.
_GUARD_SECONDS = 2.0
#: Errors that say nothing of the file: it can be read later.
_FOR_NOW = NO_DESCRIPTOR | {errno.ENOMEM, errno.EINTR}


class Number:
    """A process's number, locked as long as the process lives."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = -1
        self._was_told = False
        #: -1: the process has none, for the directory cannot be used.
        self.value = -1

    @property
    def path(self) -> str:
        """Where the process of this number counts."""
        return os.path.join(self._directory, f"counter_{self.value}.db")

    def path_of(self, name: str) -> str:
        """Return the path of another file of the process of this number (``recent.py``)."""
        return os.path.join(self._directory, f"{name}_{self.value}.json")

    def is_lost(self) -> bool:
        """Tell whether there is no number, or another process may have it by now."""
        if self._lock < 0:
            return True
        try:
            return os.fstat(self._lock).st_nlink == 0
        except OSError:
            return False  # not known: the next look tells

    def take(self) -> None:
        """Take the lowest number that is free, or none where that cannot be done now."""
        self.close()
        try:
            runtime_in(os.path.dirname(self._directory)).top.require()
            prepare_directory(self._directory)  # others may have removed it
            with _guard(self._directory):
                self._take()
        except (OSError, UnusableDirectory, StateUnavailable) as exc:
            self.close()
            if not self._was_told:
                log.warning("metrics: nothing can be kept in %s now: %s", self._directory, exc)
            self._was_told = True

    def _take(self) -> None:
        self.value = 0
        while (lock := _try_lock(self._directory, str(self.value))) is None:
            self.value += 1
        self._lock = lock
        # An empty one is what a full disk has left: nothing was counted there.
        if os.path.lexists(self.path) and os.lstat(self.path).st_size:
            try:
                read_counts(self.path)
            except (OSError, DamagedFile) as exc:
                if isinstance(exc, OSError) and exc.errno in _FOR_NOW:
                    raise
                is_other = isinstance(exc, OtherLayout)
                why = "another version wrote it" if is_other else "it is damaged"
                log.warning("metrics: what %s has counted is lost: %s", self.path, why)
                os.unlink(self.path)

    def close(self) -> None:
        """Give the number back. May be called twice."""
        lock, self._lock, self.value = self._lock, -1, -1
        if lock >= 0:
            close_fd(lock)


def read_counts(path: str) -> "Counts | None":
    """Return what a file has counted: see ``parse_counts``.

    Raises:
        OSError: it cannot be opened or read.
        DamagedFile: it is no file of counts.
    """
    data = read_regular(path, SIZE)
    if data is None:
        raise DamagedFile("it is no regular file")
    return parse_counts(data)


def read_all(directory: str) -> tuple[list["Counts"], int]:
    """Return what each file has counted, and how many files are damaged."""
    found, damaged = [], 0
    for path in files(directory):
        try:
            counts = read_counts(path)
        except OtherLayout:
            continue
        except (OSError, DamagedFile):
            damaged += 1
            continue
        if counts is not None:
            found.append(counts)
    return found, damaged


def clear_if_alone(directory: str) -> bool:
    """Remove all files, so that counts begin at zero; not where a process counts in them."""
    with _guard(directory), contextlib.ExitStack() as held:
        names = os.listdir(directory)
        for name in filter(str.isdecimal, names):
            lock = _try_lock(directory, name)
            if lock is None:
                return False
            held.callback(close_fd, lock)
        for name in names:
            if name != _GUARD:
                os.unlink(os.path.join(directory, name))
        return True


def files(directory: str) -> list[str]:
    """Return the paths of all files of counts: none where the directory cannot be read."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [
        os.path.join(directory, name)
        for name in names
        if name.startswith("counter_") and name.endswith(".db")
    ]


def _try_lock(directory: str, name: str) -> int | None:
    fd = open_private(directory, name)
    with contextlib.ExitStack() as opened:
        opened.callback(close_fd, fd)
        if not try_flock(fd):
            return None
        opened.pop_all()
    return fd


@contextlib.contextmanager
def _guard(directory: str) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with contextlib.suppress(StateUnavailable):  # without it: counting must not stop work
            held.enter_context(guarded(directory, _GUARD, "the metrics", _GUARD_SECONDS))
        yield
