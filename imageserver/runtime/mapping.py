# SPDX-License-Identifier: Apache-2.0
"""The slot table as one process has it open, and the records that this process holds."""

import contextlib
import os
from collections.abc import Iterator

from imageserver.core.errors import StateUnavailable
from imageserver.core.slots import Deaths, SlotTable
from imageserver.runtime import tablefile
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.guard import Guard
from imageserver.runtime.private import close_fd, is_at
from imageserver.runtime.processes import forks, owner_of

#: What the table is in an error's sentence.
WHAT = "the slot table"
#: How long what need not wait for the guard waits for it.
BRIEF_SECONDS = 0.05


class ClaimedSlot:
    """A record this process holds."""

    def __init__(self, mapping: "Mapping", index: int, started_ns: int, deaths: Deaths) -> None:
        self.deaths = deaths
        self._mapping = mapping
        self._index = index
        self._started_ns = started_ns
        self._held = True

    def progress(self, done: int, expected: int) -> None:
        """Show how far the operation has come, in bytes."""
        if self._held:
            self._mapping.table.set_progress(self._index, done, expected)

    def share(self) -> None:
        """Let others share the image."""
        self._mapping.table.share(self._index)

    def release(self, *, settled: bool = True) -> None:
        """Give the record back. Never fails, may be called twice.

        ``settled`` False: a write may still be under way.
        """
        if self._held:
            self._held = False
            if not settled:
                self._mapping.count_death()
            self._mapping.table.release(self._index, self._mapping.owner, self._started_ns)


class Mapping:
    """The table as one process has it open."""

    def __init__(self, runtime: RuntimeDirectory, patience: float) -> None:
        """Map it; ``patience``, in seconds: see ``Guard``."""
        owner = owner_of(os.getpid())
        assert owner is not None  # noqa: S101 - this process runs
        self.owner = owner
        self.forks = forks()
        self._path = os.path.join(runtime.path, tablefile.TABLE)
        with contextlib.ExitStack() as opened:
            use, self.file = tablefile.reopen(runtime)
            opened.callback(close_fd, use)
            opened.callback(close_fd, self.file)
            self.lock = Guard(self.file, WHAT, patience)
            self._found = os.fstat(self.file)
            self._map, self.table = tablefile.map_kept(self.file)
            opened.callback(self._map.close)
            opened.callback(self.table.close)
            self._opened = opened.pop_all()

    def is_in_place(self) -> bool:
        """Tell whether the table's path still leads to this very file: one stat(2)."""
        return is_at(self._path, self._found)

    @contextlib.contextmanager
    def guard(self, seconds: float | None = None) -> Iterator[SlotTable]:
        """Hold the table against all other threads and processes: see ``Guard.hold``."""
        with self.lock.hold(seconds):
            yield self.table

    def count_death(self) -> None:
        """Count one; without the guard only where another process keeps it."""
        with contextlib.ExitStack() as guarded:
            with contextlib.suppress(StateUnavailable):
                guarded.enter_context(self.guard(BRIEF_SECONDS))
            self.table.count_death()

    def close(self) -> None:
        """Unmap."""
        self._opened.close()
