# SPDX-License-Identifier: Apache-2.0
"""Which files a process counts in: its number, the lowest that no other process has.

    metrics/N               locked by the process that has number N (flock(2)); the kernel unlocks
    metrics/counter_N.db    what N counted, its dead predecessors included
    metrics/histogram_N.db
    metrics/guard           held while numbers are taken, or files cleared

prometheus_client names files after the pid, and they would pile up with every reload. A worker
that goes on where a dead one has stopped keeps its counts, and there are never more files than
processes have lived at once.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from imageserver.core.errors import StateUnavailable
from imageserver.runtime.directory import runtime_in
from imageserver.runtime.private import UnusableDirectory, open_private, prepare_directory

log = logging.getLogger(__name__)

TYPES = ("counter", "histogram")
_GUARD = "guard"
#: The guard is held for milliseconds. Only a process stopped inside it can make us wait.
_GUARD_SECONDS = 2.0
#: All that is declared takes 60 KiB, most of it the histogram's. Allocated beforehand where there
#: is room, so that a disk that is full later has a place for what is counted then.
FILE_SIZE = 128 * 1024
#: Of prometheus_client's files: how much is used, padded; then entries of a key's length, the
#: key, padding to eight bytes, and two numbers.
_INT = struct.Struct("=i")
_PAIR = struct.Struct("=dd")
_FIRST = 8


class Numbers:
    """A process's number; a forked child takes its own."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._pid = self._lock = -1
        self._was_told = False
        #: -1: there is no place for files now.
        self.number = -1

    def is_mine(self) -> bool:
        """Tell whether the number was taken by this very process."""
        return self._pid == os.getpid()

    def is_lost(self) -> bool:
        """Tell whether there is no number, or another process may have it by now."""
        return self._lock < 0 or os.fstat(self._lock).st_nlink == 0

    def take(self) -> None:
        """Take the lowest number that is free."""
        inherited, self._lock, self.number = self._lock, -1, -1
        self._pid = os.getpid()
        try:
            runtime_in(os.path.dirname(self._directory)).top.require()
            prepare_directory(self._directory)  # others may have removed it
            with _guard(self._directory):
                self.number, self._lock = self._try_all()
        except (OSError, UnusableDirectory, StateUnavailable) as exc:
            if not self._was_told:
                log.warning("metrics: nothing can be kept in %s now: %s", self._directory, exc)
            self._was_told = True
        # After the own one was taken, which so is another: who inherits files must notice.
        if inherited >= 0:
            os.close(inherited)

    def _try_all(self) -> tuple[int, int]:
        number = 0
        while (lock := _try_lock(self._directory, str(number))) is None:
            number += 1
        for path in (path_of(self._directory, type_, number) for type_ in TYPES):
            # An empty one is what a full disk has left: nothing was counted there.
            if os.path.lexists(path) and os.lstat(path).st_size and not is_sound(path):
                log.warning("metrics: what %s has counted is lost: it is damaged", path)
                os.unlink(path)
        return number, lock

    def close(self) -> None:
        """Give the number back."""
        if self._lock >= 0:
            os.close(self._lock)
        self._pid = self._lock = self.number = -1


def path_of(directory: str, type_: str, number: int) -> str:
    """Return where the process of this number counts."""
    return os.path.join(directory, f"{type_}_{number}.db")


def clear_if_alone(directory: str) -> bool:
    """Remove all files, so that counts begin at zero; not where a process counts in them."""
    with _guard(directory), contextlib.ExitStack() as held:
        names = os.listdir(directory)
        for name in filter(str.isdecimal, names):
            lock = _try_lock(directory, name)
            if lock is None:
                return False
            held.callback(os.close, lock)
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
        if name.endswith(".db") and name.partition("_")[0] in TYPES
    ]


class DamagedFile(Exception):
    """The bytes are no file of counts."""


def is_sound(path: str) -> bool:
    """Tell whether prometheus_client can read a file: it would hang, or fail for ever."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        parse_counts(Path(path).read_bytes())
    except (OSError, DamagedFile):
        return False
    return True


def parse_counts(data: bytes) -> dict[str, int]:
    """Return where the numbers of each key are in the bytes of a file; in order.

    Raises:
        DamagedFile: prometheus_client could not read them.
    """
    try:
        return _positions(data)
    except (ValueError, TypeError, AttributeError, RecursionError, struct.error) as exc:
        raise DamagedFile(str(exc)) from exc


def used_size(data: bytes) -> int:
    """Return how many bytes of a sound file are in use."""
    (used,) = _INT.unpack_from(data)
    return int(used)


def _positions(data: bytes) -> dict[str, int]:
    used = used_size(data)
    if not 0 <= used <= len(data):
        raise ValueError(used)
    data = data[:used]
    found = {}
    position = _FIRST
    while position < used:
        (size,) = _INT.unpack_from(data, position)
        key = data[position + 4 : position + 4 + size]
        numbers = position + 4 + size + 8 - (size + 4) % 8
        value, _ = _PAIR.unpack_from(data, numbers)
        _check_entry(key, size, value)
        found[key.decode()] = numbers
        position = int(numbers + _PAIR.size)
    return found


def _check_entry(key: bytes, size: int, value: float) -> None:
    metric, name, labels, text = json.loads(key)
    texts = (metric, name, text, *labels.keys(), *labels.values())
    if size <= 0 or not all(isinstance(found, str) for found in texts):
        raise ValueError(key)
    if not 0 <= value < math.inf or not float(labels.get("le", 0)) >= 0:
        raise ValueError(value)


def _try_lock(directory: str, name: str) -> int | None:
    fd = open_private(directory, name)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@contextlib.contextmanager
def _guard(directory: str) -> Iterator[None]:
    fd = open_private(directory, _GUARD)
    deadline = time.monotonic() + _GUARD_SECONDS
    try:
        while time.monotonic() < deadline:  # afterwards without it: counting must not stop work
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.001)
        yield
    finally:
        os.close(fd)
