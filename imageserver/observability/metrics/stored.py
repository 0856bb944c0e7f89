# SPDX-License-Identifier: Apache-2.0
"""Where the counts of a process are kept: in memory, and written through to files of its own.

The files are those of prometheus_client's multiprocess mode, whose reader adds them up:

    used, unused                    two integers of four bytes
    length, key, blanks to align    an entry: the key is JSON
    value, timestamp                two floats; the next entry begins where ``used`` ends

Its own writer maps them, and a mapped file that others cut short, or that a full disk has no
room for, kills the process that counts (SIGBUS). Ours writes (pwrite(2), as quick where there
is a page), and what could not be written is written later: counting never stops work.
"""

import contextlib
import logging
import os
import struct
from collections.abc import Callable
from threading import Lock
from typing import Any

from prometheus_client.mmap_dict import mmap_key

from imageserver.observability.metrics.numbers import (
    FILE_SIZE,
    DamagedFile,
    Numbers,
    parse_counts,
    path_of,
    used_size,
)
from imageserver.runtime.private import open_private

log = logging.getLogger(__name__)

_INT = struct.Struct("=i")
_PAIR = struct.Struct("=dd")
_FIRST = 8


class CountFile:
    """One file, and the same in memory."""

    def __init__(self, path: str) -> None:
        """Go on with the file at ``path``, which is sound, empty or missing; "": have no file."""
        self._path = path
        self._fd = -1
        self._image = bytearray(_INT.pack(_FIRST) + bytes(_INT.size))
        self._positions: dict[str, int] = {}
        self._is_whole = False
        self._was_told = False
        if path:
            self._open()
            self._load()
            self.mend()

    def _open(self) -> None:
        try:
            self._fd = open_private(*os.path.split(self._path))
            self._reserve()
        except OSError as exc:
            self._failed(exc)

    def _reserve(self) -> None:
        """Give the file its size; on a full disk it has no room yet."""
        try:
            os.posix_fallocate(self._fd, 0, FILE_SIZE)
        except OSError as exc:
            self._failed(exc)
            os.ftruncate(self._fd, max(FILE_SIZE, os.fstat(self._fd).st_size))

    def _load(self) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        # It was sound when the number was taken, and may have been spoilt since.
        with contextlib.suppress(DamagedFile):
            self._positions = parse_counts(data)
            if self._positions:
                self._image = bytearray(data[: used_size(data)])

    def read(self, key: str) -> float:
        """Return a value; one that is new begins with zero."""
        position = self._positions.get(key)
        if position is None:
            self._append(key)
            return 0.0
        value, _ = _PAIR.unpack_from(self._image, position)
        return float(value)

    def _append(self, key: str) -> None:
        encoded = key.encode()
        start = len(self._image)
        self._image += _INT.pack(len(encoded)) + encoded + b" " * (8 - (len(encoded) + 4) % 8)
        self._positions[key] = len(self._image)
        self._image += _PAIR.pack(0.0, 0.0)
        _INT.pack_into(self._image, 0, len(self._image))
        self._write(start, len(self._image))
        self._write(0, _INT.size)  # last: a reader goes no further than it says

    def write(self, key: str, value: float) -> None:
        """Set a value that has been read before."""
        position = self._positions[key]
        _PAIR.pack_into(self._image, position, value, 0.0)
        self._write(position, position + _PAIR.size)

    def _write(self, start: int, end: int) -> None:
        if self._fd < 0:
            return
        try:
            if os.pwrite(self._fd, self._image[start:end], start) < end - start:
                self._is_whole = False
        except OSError as exc:
            self._failed(exc)

    def _failed(self, exc: OSError) -> None:
        self._is_whole = False
        if not self._was_told:
            log.warning("metrics: %s cannot be written now: %s", self._path, exc.strerror)
        self._was_told = True

    def mend(self) -> None:
        """Write anew what others have removed or cut short, or could not be written before."""
        if not self._path or (self._is_whole and self._is_in_place()):
            return
        if self._fd < 0 or os.fstat(self._fd).st_nlink == 0:
            self.close()
            self._open()
        elif os.fstat(self._fd).st_size < FILE_SIZE:
            with contextlib.suppress(OSError):
                self._reserve()
        self._is_whole = self._fd >= 0
        self._write(_INT.size, len(self._image))
        self._write(0, _INT.size)

    def _is_in_place(self) -> bool:
        found = os.fstat(self._fd)
        return found.st_nlink > 0 and found.st_size >= FILE_SIZE

    def close(self) -> None:
        """Let the file go. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class Store:
    """All values of a process. It makes them for prometheus_client; any thread may count."""

    def __init__(self, directory: str) -> None:
        """Keep files in ``directory``, as long as that is possible."""
        self._directory = directory
        self._numbers = Numbers(directory)
        self._files: dict[str, CountFile] = {}
        self._values: list[_Value] = []
        self._lock = Lock()

    def value(self, kind: str, *naming: Any) -> "_Value":  # noqa: ANN401 - the library's
        """Make a value: what ``prometheus_client.values.ValueClass`` is for its counters."""
        key = mmap_key(*naming)
        with self._lock:
            value = _Value(kind, key, self._add)
            self._follow()
            self._attach(value)
            self._values.append(value)
        return value

    def _add(self, value: "_Value", amount: float) -> None:
        with self._lock:
            self._follow()
            value.amount += amount
            value.file.write(value.key, value.amount)

    def _follow(self) -> None:
        """Go on in files of this process's own after a fork, with what they say."""
        if self._numbers.is_mine():
            return
        self._numbers.take()
        for value in self._values:
            value.amount = 0.0
        self._reattach()

    def mend(self) -> None:
        """Make up for what could not be written, or was removed; asked for now and then."""
        with self._lock:
            self._follow()
            if self._numbers.is_lost():
                before = self._numbers.number
                self._numbers.take()
                if (before, self._numbers.number) != (-1, -1):
                    self._reattach()
            for file in self._files.values():
                file.mend()

    def _reattach(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        for value in self._values:
            self._attach(value)

    def _attach(self, value: "_Value") -> None:
        """Add a value to what its file has of it, from those who had the number before."""
        if value.kind not in self._files:
            number = self._numbers.number
            path = path_of(self._directory, value.kind, number) if number >= 0 else ""
            self._files[value.kind] = CountFile(path)
        value.file = self._files[value.kind]
        found = value.file.read(value.key)
        if value.amount:
            value.file.write(value.key, found + value.amount)
        value.amount += found

    def close(self) -> None:
        """Let the files and the number go."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._numbers.close()


class _Value:
    """A value as prometheus_client's counters know it."""

    file: CountFile

    def __init__(self, kind: str, key: str, add: Callable[["_Value", float], None]) -> None:
        self.kind, self.key = kind, key
        self.amount = 0.0
        self._add = add

    def inc(self, amount: float) -> None:
        """Add to it."""
        self._add(self, amount)
