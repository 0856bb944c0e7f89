# SPDX-License-Identifier: Apache-2.0
"""The slot table between processes: the guard, and who is alive.

``core/slots.py`` has the rules; this module gives them the system. Every process maps the same
small file (``tablefile.py``) and claims under a guard (``guard.py``). A descriptor inherited over
fork would share its parent's flock(2), so each process opens the file itself, after the fork.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

from imageserver.core import slots
from imageserver.core.entry import fields
from imageserver.core.errors import NoSlot, StateUnavailable
from imageserver.core.ports import Ticket
from imageserver.core.slots import Holder, IncompatibleTable, Kind, Owner, SlotTable
from imageserver.runtime import tablefile
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.guard import Guard
from imageserver.runtime.private import is_at, own_files
from imageserver.runtime.processes import (
    EXIT_SECONDS,
    EXIT_STEP_SECONDS,
    forks,
    is_alive,
    is_exiting,
    owner_of,
)

log = logging.getLogger(__name__)

#: The guard is held for microseconds: only a process stopped inside it makes others wait.
_GUARD_SECONDS = 5.0
#: ... as long as this, where all that depends on it is a line in the log.
_NOTE_SECONDS = 0.05
_WHAT = "the slot table"


class ClaimedSlot:
    """A record this process holds."""

    def __init__(self, mapping: "_Mapping", index: int, started_ns: int) -> None:
        self._mapping = mapping
        self._index = index
        self._started_ns = started_ns
        self._held = True

    def progress(self, done: int, expected: int) -> None:
        """Show how far the operation has come, in bytes."""
        if self._held:
            self._mapping.table.set_progress(self._index, done, expected)

    def release(self) -> None:
        """Give the record back. Never fails, may be called twice."""
        if self._held:
            self._held = False
            self._mapping.table.release(self._index, self._mapping.owner, self._started_ns)


class _Mapping:
    """The table as one process has it open."""

    def __init__(self, runtime: RuntimeDirectory) -> None:
        owner = owner_of(os.getpid())
        assert owner is not None  # noqa: S101 - this process runs
        self.owner = owner
        self.forks = forks()
        self._path = os.path.join(runtime.path, tablefile.TABLE)
        with contextlib.ExitStack() as opened:
            use, self.file = tablefile.reopen(runtime)
            opened.callback(os.close, use)
            opened.callback(os.close, self.file)
            self.lock = Guard(self.file, _WHAT, _GUARD_SECONDS)
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

    def close(self) -> None:
        self._opened.close()


class SharedTable:
    """The slot table in ``directory``, shared by all processes of the server."""

    def __init__(
        self,
        directory: RuntimeDirectory | str,
        limits: dict[Kind, int],
        freed: Callable[[Holder | None], None] = lambda _: None,
    ) -> None:
        """Name the table; it is mapped at first use, in whichever process that is.

        A child maps the table that its parent has found; a process that has no parent with one
        gives a path. ``freed`` is told what this process sweeps; None: a damaged record.
        """
        self._freed = freed
        self._is_lent = isinstance(directory, RuntimeDirectory)
        self._runtime = (
            directory if isinstance(directory, RuntimeDirectory) else RuntimeDirectory(directory)
        )
        self._limits = limits
        self._mapping: _Mapping | None = None
        self._opening = threading.Lock()

    def open(self) -> None:
        """Map the table now, making or replacing it where no process uses it.

        Raises:
            IncompatibleTable: processes of another version use it.
            OSError: the directory cannot be used.
        """
        self._open()

    def _open(self) -> _Mapping:
        # A child must not share its parent's flock(2): it maps the file itself, at first use.
        mapping = self._mapping
        if mapping is not None and mapping.forks == forks():
            return mapping
        with self._opening:
            if self._mapping is None or self._mapping.forks != forks():
                self._mapping = _Mapping(self._runtime)
            return self._mapping

    @own_files(_WHAT)
    def claim(self, kind: Kind, ticket: Ticket) -> ClaimedSlot:
        """Take a slot; dead holders are swept first where the table looks full.

        Raises:
            NoSlot: as many as the limit allows are held by the living.
            StateUnavailable: the table is not the one that the next server would find, another
                process keeps the guard, or the system has no descriptor.
        """
        mapping = self._open()
        # A worker's row limits nothing, and a worker that replaces a dead one must start.
        if kind is not Kind.WORKER and not mapping.is_in_place():
            raise StateUnavailable(
                f"the slot table in {self._runtime.path} was removed or replaced"
            )
        holder = Holder(
            kind,
            mapping.owner,
            ticket.transfer,
            ticket.operation,
            ticket.image,
            ticket.client,
            time.monotonic_ns(),
        )
        index = self._claim(mapping, holder)
        deadline = time.monotonic() + EXIT_SECONDS if index is None else 0.0
        while index is None:
            # Once more at the end: another process may have swept between our claim and sweep.
            is_last = not self.sweep() and not self._awaits_exit(kind, deadline)
            index = self._claim(mapping, holder)
            if index is None and is_last:
                raise NoSlot(kind)
        return ClaimedSlot(mapping, index, holder.started_ns)

    def _claim(self, mapping: _Mapping, holder: Holder) -> int | None:
        guard = mapping.lock
        guard.acquire()
        try:
            return mapping.table.claim(holder, self._limits.get(holder.kind, slots.CAPACITY))
        finally:
            guard.release()

    def _awaits_exit(self, kind: Kind, deadline: float) -> bool:
        """Wait a moment where a holder of this kind is being killed; else return False."""
        if time.monotonic() >= deadline or not any(
            is_exiting(holder.owner) for holder in self.holders(kind)
        ):
            return False
        time.sleep(EXIT_STEP_SECONDS)
        return True

    def is_first(self, text: str) -> bool:
        """Tell whether no process of the server has logged this lately; now it has."""
        key = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8], "big")
        try:
            with own_files(_WHAT), self._open().guard(_NOTE_SECONDS) as table:
                return table.note(key)
        except StateUnavailable:
            return True  # better logged twice than never, or late

    @own_files(_WHAT)
    def sweep(self) -> int:
        """Free what dead processes held; return how many records."""
        # Outside the guard, for it reads /proc: a process that is dead stays dead.
        owners = {holder.owner for holder in self.holders(*Kind)}
        dead = {owner for owner in owners if not is_alive(owner)}
        with self._open().guard() as table:
            freed = table.sweep(lambda owner: owner not in dead)
        for holder in freed:
            self._freed(holder)
            if holder is None:
                log.warning("slot table: a damaged record was freed")
            elif holder.kind is not Kind.WORKER:
                told = fields(
                    transfer=holder.transfer, op=holder.operation, worker=holder.owner.pid
                )
                log.warning("slot freed: its worker died", extra=told)
        return len(freed)

    def owner(self) -> Owner:
        """Return who this process is."""
        return self._open().owner

    @own_files(_WHAT)
    def operations_on(self, image: str) -> set[str]:
        """Return the operations of the living that hold an image, by its key."""
        deadline = time.monotonic() + EXIT_SECONDS
        while True:
            held = [h for h in self.holders(Kind.WRITE, Kind.OTHER) if h.image == image]
            living = {owner for owner in {holder.owner for holder in held} if is_alive(owner)}
            dying = any(is_exiting(owner) for owner in living)
            if not dying or time.monotonic() > deadline:
                return {holder.operation for holder in held if holder.owner in living}
            time.sleep(EXIT_STEP_SECONDS)

    def mend(self) -> None:
        """Write the header anew where it was damaged: without it no new worker could start.

        Safe, for no process may replace a table that this one has mapped.
        """
        if self._open().table.mend():
            log.warning("slot table: a damaged header was mended")

    def prove(self) -> None:
        """Prove that slots can be claimed here, and are those that the next process will see.

        Raises:
            IncompatibleTable: the header is damaged, or the file was cut short, or is not the
                one in the directory.
            NoSlot: the table is full.
            StateUnavailable: another process keeps the guard.
        """
        mapping = self._open()
        where = f"the file {tablefile.TABLE} in {self._runtime.path}"
        if not mapping.is_in_place():
            raise IncompatibleTable(f"{where} is another, or gone")
        if os.fstat(mapping.file).st_size < slots.SIZE:
            raise IncompatibleTable(f"{where} was cut short")
        if mapping.table.is_damaged():
            raise IncompatibleTable("its header is damaged")
        self.claim(Kind.OTHER, Ticket("", "check", "", "")).release()

    @own_files(_WHAT)
    def living(self, *kinds: Kind) -> list[Holder]:
        """Return what processes that live hold now: see ``ports.Living``."""
        held = self.holders(*kinds)
        living = {owner for owner in {holder.owner for holder in held} if is_alive(owner)}
        return [holder for holder in held if holder.owner in living]

    def holders(self, *kinds: Kind) -> list[Holder]:
        """Return a snapshot of what is held."""
        return list(self._open().table.holders(*kinds))

    def count(self, kind: Kind) -> int:
        """Return how many records of a kind are held, the dead's included."""
        return self._open().table.count(kind)

    def close(self) -> None:
        """Unmap. Records still held stay, for ``sweep`` to find."""
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            mapping.close()
        if not self._is_lent:
            self._runtime.close()
