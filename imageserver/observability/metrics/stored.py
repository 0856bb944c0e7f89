# SPDX-License-Identifier: Apache-2.0
"""Where the counts of a process are kept: in memory, and written to a file of its own.

To count costs no system call. What was counted is written at most ``FLUSH_SECONDS`` later, all
series at once, so a process that is killed takes no more than that along.

The file is written with pwrite(2), not mapped: a mapped file that others cut short, or for which
a full disk has no room, kills the process that counts (SIGBUS). What cannot be written now is
written later: counting never stops work.
"""

import contextlib
import logging
import os
import time
from threading import Lock
from weakref import WeakSet

from imageserver.observability.metrics.layout import (
    SIZE,
    DamagedFile,
    add_up,
    no_counts,
    pack_counts,
    parse_counts,
)
from imageserver.observability.metrics.numbers import Number
from imageserver.runtime.private import close_fd, open_private

log = logging.getLogger(__name__)

#: How long what was counted may be missing from the file.
FLUSH_SECONDS = 0.25


class Store:
    """The counts of a process; any thread may count. A forked child begins at zero."""

    def __init__(self, directory: str) -> None:
        """Keep a file in ``directory``, as long as that is possible."""
        self._number = Number(directory)
        self._fd = -1
        self._was_told = False
        self._begin()
        _stores.add(self)

    def _begin(self) -> None:
        self._counts = no_counts()
        self._due = 0.0
        #: The file has all that was counted, as far as this process knows.
        self._is_written = False
        self._counting = Lock()
        self._writing = Lock()

    def path_of(self, name: str) -> str:
        """Return the path of another file of this process's number; "" where it has none now."""
        return "" if self._fd < 0 else self._number.path_of(name)

    def leave_to_parent(self) -> None:
        """In a forked child: count in a file of its own from now on."""
        self._number.close()
        self._close()
        self._begin()

    def add(self, *amounts: tuple[int, float]) -> None:
        """Add to the numbers at these places."""
        with self._counting:
            for place, amount in amounts:
                self._counts[place] += amount
            self._is_written = False
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Write what was counted, where that was last done ``FLUSH_SECONDS`` ago or longer."""
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write what was counted, and anew what others have removed or cut short."""
        with self._writing:
            self._due = time.monotonic() + FLUSH_SECONDS
            if not self._has_file():
                return
            with self._counting:
                if self._is_written:
                    return
                counts = pack_counts(self._counts)
                self._is_written = True
            self._write(counts)

    def _has_file(self) -> bool:
        """Make sure that there is a whole file of this process's own; False: it cannot be had."""
        if self._number.is_lost():
            self._number.take()
            if self._number.value < 0:
                return False
            self._open(is_new=True)
        elif self._fd < 0:
            self._open(is_new=False)
        else:
            return self._look()
        return self._fd >= 0

    def _look(self) -> bool:
        """Make the file whole again if need be; False: it cannot be looked at now."""
        try:
            found = os.fstat(self._fd)
        except OSError as exc:
            self._failed(exc)
            return False
        if found.st_nlink == 0:
            self._open(is_new=False)
        elif found.st_size < SIZE:
            self._reserve()
        return self._fd >= 0

    def _open(self, *, is_new: bool) -> None:
        """Open the number's file; where the number is new, go on with what its last owner left."""
        before, self._fd = self._fd, -1
        self._is_written = False
        try:
            self._fd = open_private(*os.path.split(self._number.path))
            is_same = before >= 0 and os.path.samestat(os.fstat(before), os.fstat(self._fd))
            if is_new and not is_same:
                self._go_on()
            self._reserve()
        except OSError as exc:
            self._failed(exc)
            self._close()
            if is_new:  # what its last owner has left must not be written over
                self._number.close()
        finally:
            if before >= 0:
                close_fd(before)

    def _go_on(self) -> None:
        # It was sound when the number was taken, and may have been damaged since.
        with contextlib.suppress(DamagedFile):
            left = parse_counts(os.pread(self._fd, SIZE, 0))
            if left is not None:
                with self._counting:
                    self._counts = add_up((self._counts, left))

    def _reserve(self) -> None:
        """Give the file its size now, so that it has room on a disk that is full later."""
        self._is_written = False
        try:
            os.posix_fallocate(self._fd, 0, SIZE)
        except OSError as exc:
            self._failed(exc)
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, max(SIZE, os.fstat(self._fd).st_size))

    def _write(self, counts: bytes) -> None:
        try:
            if os.pwrite(self._fd, counts, 0) < len(counts):
                self._is_written = False
        except OSError as exc:
            self._failed(exc)

    def _failed(self, exc: OSError) -> None:
        self._is_written = False
        if not self._was_told:
            log.warning("metrics: %s cannot be written now: %s", self._number.path, exc.strerror)
        self._was_told = True

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)

    def close(self) -> None:
        """Write what was counted, and let the file and the number go."""
        self.flush()
        self._close()
        self._number.close()


_stores: WeakSet[Store] = WeakSet()


def _leave_all() -> None:
    for store in _stores:
        store.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all)
