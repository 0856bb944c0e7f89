# SPDX-License-Identifier: Apache-2.0
"""Marks that a server's processes set for each other, and that end with whoever has set them.

They are hints: a process that has set very many drops them all, and begins anew.

A mark is a lock on one byte of the slot table's file, far beyond the table, whose place is a hash
of what is marked (F_OFD_SETLK, fcntl(2)). The table's guard is another kind of lock (flock(2)).
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Iterable

from imageserver.runtime.directory import RuntimeDirectory

#: struct flock (fcntl(2)): type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi4x")
_FIRST = 1 << 40
_PLACES = 1 << 60
#: Marks of one process. A look walks those of all: 10 µs where there are 1024, 350 with 20,000.
_MOST = 1024


class Marks:
    """The marks of a server on things that are named by numbers. Thread-safe."""

    def __init__(self, runtime: RuntimeDirectory) -> None:
        self._runtime = runtime
        self._opening = threading.Lock()
        self._fd = -1
        self._changing = threading.Lock()
        self._places: set[int] = set()

    def _file(self) -> int:
        """Open the file anew: locks belong to who has opened it. -1 where it is not kept."""
        with self._opening:
            if self._fd < 0:
                fd = self._runtime.reopen("slots")
                self._fd = -1 if fd is None else fd
            return self._fd

    def add(self, thing: tuple[int, ...]) -> None:
        """Mark a thing, for as long as this process lives, or until it has marked a thousand."""
        place = _place(thing)
        with self._changing:
            if len(self._places) >= _MOST:
                self._lock(fcntl.F_UNLCK, _FIRST, _PLACES)
                self._places.clear()
            self._lock(fcntl.F_RDLCK, place, 1)
            self._places.add(place)

    def _lock(self, kind: int, first: int, count: int) -> None:
        lock = _FLOCK.pack(kind, os.SEEK_SET, first, count, 0)
        # Nobody locks for writing, so it never fails but where there is no file.
        with contextlib.suppress(OSError, ValueError):
            fcntl.fcntl(self._file(), fcntl.F_OFD_SETLK, lock)

    def among(self, things: Iterable[tuple[int, ...]]) -> set[tuple[int, ...]]:
        """Return which of these others have marked."""
        return {thing for thing in things if self._is_marked(thing)}

    def _is_marked(self, thing: tuple[int, ...]) -> bool:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _place(thing), 1, 0)
        try:
            found: int = _FLOCK.unpack(fcntl.fcntl(self._file(), fcntl.F_OFD_GETLK, asked))[0]
        except (OSError, ValueError):
            return False
        return found != fcntl.F_UNLCK


def _place(thing: tuple[int, ...]) -> int:
    digest = hashlib.blake2b(repr(thing).encode(), digest_size=8).digest()
    return _FIRST + int.from_bytes(digest, "big") % _PLACES
