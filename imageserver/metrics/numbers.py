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
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from imageserver.shared import open_private

log = logging.getLogger(__name__)

TYPES = ("counter", "histogram")
_GUARD = "guard"
#: The guard is held for milliseconds. Only a process stopped inside it can make us wait.
_GUARD_SECONDS = 2.0
#: All that is declared takes 60 KiB, most of it the histogram's. Allocated beforehand, for a write
#: to a mapped page that a full disk has no room for would kill the process (SIGBUS).
FILE_SIZE = 128 * 1024
#: Of prometheus_client's files: how much is used, padded; then entries of a key's length, the
#: key, padding to eight bytes, and two numbers.
_INT = struct.Struct("=i")
_PAIR = struct.Struct("=dd")
_FIRST = 8


class Numbers:
    """A process's number, taken when it is first asked for; a forked child takes its own."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._pid = self._number = self._lock = -1

    def mine(self) -> int:
        """Return the number of this process."""
        pid = os.getpid()
        if pid != self._pid:
            inherited = self._lock
            with _guard(self._directory):
                self._number, self._lock = self._take()
            self._pid = pid
            # After the own one was taken, which so is another: who inherits files must notice.
            if inherited >= 0:
                os.close(inherited)
        return self._number

    def _take(self) -> tuple[int, int]:
        number = 0
        while (lock := _try_lock(self._directory, str(number))) is None:
            number += 1
        for name in (f"{type_}_{number}.db" for type_ in TYPES):
            path = os.path.join(self._directory, name)
            if os.path.lexists(path) and not is_sound(path):
                log.warning("metrics: what %s has counted is lost: it is damaged", path)
                os.unlink(path)
            _allocate(self._directory, name)
        return number, lock

    def close(self) -> None:
        """Give the number back."""
        if self._lock >= 0:
            os.close(self._lock)
        self._pid = self._number = self._lock = -1


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
    """Return the paths of all files of counts."""
    return [
        os.path.join(directory, name)
        for name in sorted(os.listdir(directory))
        if name.endswith(".db") and name.partition("_")[0] in TYPES
    ]


def is_sound(path: str) -> bool:
    """Tell whether prometheus_client can read a file: it would hang, or fail for ever."""
    try:
        data = Path(path).read_bytes()
        (used,) = _INT.unpack_from(data)
        if not 0 <= used <= len(data):
            return False
        position = _FIRST
        while position < used:
            position = _skip(data[:used], position)
    except (OSError, ValueError, TypeError, struct.error):
        return False
    return True


def _skip(data: bytes, position: int) -> int:
    """Return where the entry after the one at ``position`` begins; ValueError: it is none."""
    (size,) = _INT.unpack_from(data, position)
    key = data[position + 4 : position + 4 + size]
    numbers = position + 4 + size + 8 - (size + 4) % 8
    value, _ = _PAIR.unpack_from(data, numbers)
    metric, name, labels, text = json.loads(key)
    texts = (metric, name, text, *labels.keys(), *labels.values())
    if size <= 0 or not all(isinstance(found, str) for found in texts):
        raise ValueError(key)
    if not 0 <= value < math.inf or not float(labels.get("le", 0)) >= 0:
        raise ValueError(value)
    return int(numbers + _PAIR.size)


def _allocate(directory: str, name: str) -> None:
    fd = open_private(directory, name)
    try:
        if os.fstat(fd).st_size < FILE_SIZE:
            os.posix_fallocate(fd, 0, FILE_SIZE)
    except OSError as exc:
        log.warning("metrics: no room to count in %s: %s", directory, exc.strerror)
    finally:
        os.close(fd)


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
