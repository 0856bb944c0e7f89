# SPDX-License-Identifier: Apache-2.0
"""The slot table between processes: the guard, and who is alive.

``core/slots.py`` has the rules; this module gives them the system. Every process maps the same
small file (``tablefile.py``) and claims under a guard (``guard.py``). A descriptor inherited over
fork would share its parent's flock(2), so each process opens the file itself, after the fork.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable

from imageserver.core import slots
from imageserver.core.entry import fields
from imageserver.core.errors import ImageBusy, NoImageSlot, NoSlot, StateUnavailable
from imageserver.core.ports import Ticket
from imageserver.core.slots import Holder, IncompatibleTable, Kind, Occupant, Owner
from imageserver.runtime import tablefile
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.mapping import WHAT, ClaimedSlot, Mapping
from imageserver.runtime.private import own_files, unusable
from imageserver.runtime.processes import (
    EXIT_SECONDS,
    EXIT_STEP_SECONDS,
    Life,
    forks,
    is_alive,
    is_exiting,
    life_of,
)

log = logging.getLogger(__name__)

#: The guard is held for microseconds: only a process stopped inside it makes others wait.
_GUARD_SECONDS = 5.0
#: ... as long as this, where all that depends on it is a line in the log.
_NOTE_SECONDS = 0.05


class SharedTable:
    """The slot table in ``directory``, shared by all processes of the server."""

    def __init__(
        self,
        directory: RuntimeDirectory | str,
        limits: dict[Kind, int],
        freed: Callable[[Holder | None], None] = lambda _: None,
        *,
        per_image: dict[Kind, int] | None = None,
    ) -> None:
        """Name the table; it is mapped at first use, in whichever process that is.

        A child maps the table that its parent has found; a process that has no parent with one
        gives a path. ``freed`` is told what this process sweeps; None: a damaged record.
        ``per_image``: how many one image may have of all that ``limits`` allows.
        """
        self._freed = freed
        self._is_lent = isinstance(directory, RuntimeDirectory)
        self._runtime = (
            directory if isinstance(directory, RuntimeDirectory) else RuntimeDirectory(directory)
        )
        self._limits = limits
        self._per_image = per_image or {}
        self._mapping: Mapping | None = None
        self._opening = threading.Lock()

    def open(self) -> None:
        """Map the table now, making or replacing it where no process uses it.

        Raises:
            IncompatibleTable: processes of another version use it.
            OSError: the directory cannot be used.
        """
        self._open()

    def _open(self) -> Mapping:
        # A child must not share its parent's flock(2): it maps the file itself, at first use.
        mapping = self._mapping
        if mapping is not None and mapping.forks == forks():
            return mapping
        with self._opening:
            if self._mapping is None or self._mapping.forks != forks():
                self._mapping = Mapping(self._runtime, _GUARD_SECONDS)
            return self._mapping

    def claim(
        self, kind: Kind, ticket: Ticket, *, alone: bool = False, together: bool = False
    ) -> ClaimedSlot:
        """Take a slot; dead holders are swept first where the table looks full.

        Raises:
            ImageBusy: the living have the ticket's image, and one of them or this one has it alone,
                or not all of them together.
            NoSlot: as many as the limit allows are held by the living.
            NoImageSlot: the living hold as many as the ticket's image may have.
            StateUnavailable: the table is not the one that the next server would find, another
                process keeps the guard, or the system has no descriptor.
        """
        try:
            mapping = self._open()
            # A worker's row limits nothing, and a worker that replaces a dead one must start.
            if kind is not Kind.WORKER and not mapping.is_in_place():
                raise StateUnavailable(
                    f"the slot table in {self._runtime.path} was removed or replaced"
                )
            now = time.monotonic_ns()
            holder = Holder(kind, mapping.owner, *ticket, now, 0, 0, alone, together)
            got = self._claim(mapping, holder)
            if isinstance(got, NoSlot):
                got = self._claim_at_last(mapping, holder, got)
        except OSError as exc:
            raise unusable(WHAT, exc) from exc
        return got

    def _claim_at_last(self, mapping: Mapping, holder: Holder, lack: NoSlot) -> ClaimedSlot:
        """Claim where there was no room: sweep, and wait for the dying."""
        deadline = time.monotonic() + EXIT_SECONDS
        while not self._is_full_of_living(mapping, holder, lack):
            # Once more at the end: another process may have swept between our claim and sweep.
            is_last = not self.sweep() and not self._awaits_exit(holder, lack, deadline)
            got = self._claim(mapping, holder)
            if not isinstance(got, NoSlot):
                return got
            if is_last:
                raise got
            lack = got
        raise lack

    def _is_full_of_living(self, mapping: Mapping, holder: Holder, lack: NoSlot) -> bool:
        """Tell whether the living have all that the image may have: then a sweep is of no use.

        A client that opens more than it was offered keeps the guard no longer than others do.
        """
        if not isinstance(lack, NoImageSlot):
            return False
        others = mapping.table.on_image(holder.image, holder.kind)
        lives = {self._life(mapping, other) for other in others}
        return len(others) >= self._per_image[holder.kind] and lives == {Life.LIVING}

    def _claim(self, mapping: Mapping, holder: Holder) -> ClaimedSlot | NoSlot:
        """Claim once nobody who has the image is dead or dying; ``NoSlot``: there is no room.

        Of two that want the image, one claims first, and the other sees its record: both look and
        claim within the guard. Who is dead or dying is asked outside; it stays so. The dead are
        swept, so that who takes the image next knows of them as well.
        """
        deadline = 0.0
        while True:
            got, others = self._look_and_claim(mapping, holder)
            if not (others or isinstance(got, ImageBusy)):
                return got
            lives: set[Life] = set()
            try:
                lives = {self._life(mapping, other) for other in others}
            finally:
                if isinstance(got, ClaimedSlot) and lives != {Life.LIVING}:
                    got.release()
            if lives == {Life.LIVING}:
                if isinstance(got, ImageBusy):
                    raise ImageBusy
                return got
            deadline = deadline or time.monotonic() + EXIT_SECONDS
            if time.monotonic() > deadline:
                raise ImageBusy
            if Life.DEAD in lives:
                self.sweep()
            else:
                time.sleep(EXIT_STEP_SECONDS)

    def _look_and_claim(
        self, mapping: Mapping, holder: Holder
    ) -> tuple[ClaimedSlot | NoSlot | ImageBusy, list[Occupant | None]]:
        """Claim, or say why not; return who else has the image.

        A reader that wants the image neither alone nor together has none: its record names the
        image, so that the image's readers can be counted.
        """
        table, guard, kind = mapping.table, mapping.lock, holder.kind
        has_image = holder.image and (kind is not Kind.READ or holder.alone or holder.together)
        most = self._per_image.get(kind)
        guard.acquire()
        try:
            others = table.on_image(holder.image) if has_image else []
            if others and self._is_in_the_way(holder, others):
                return ImageBusy(), others
            if most is not None and table.count_on(holder.image, kind) >= most:
                return NoImageSlot(kind), others
            index = table.claim(holder, self._limits.get(kind, slots.CAPACITY))
            if index is None:
                return NoSlot(kind), others
            return ClaimedSlot(mapping, index, holder.started_ns, table.deaths()), others
        finally:
            guard.release()

    @staticmethod
    def _is_in_the_way(holder: Holder, others: list[Occupant | None]) -> bool:
        return any(
            holder.alone or other is None or other.alone or other.together != holder.together
            for other in others
        )

    @staticmethod
    def _life(mapping: Mapping, holder: Occupant | None) -> Life:
        """Tell how a record's owner is; who has left a damaged one is dead, for all we know."""
        if holder is None:
            return Life.DEAD
        return Life.LIVING if holder.owner == mapping.owner else life_of(holder.owner)

    @own_files(WHAT)
    def gives_way(self, image: str, *, to_sharers: bool) -> bool:
        """Tell whether who has an image's lock, by its key, gives it back in a moment.

        It does so if it is dying, or shares the image. ``to_sharers``: who asks waits for that.
        """
        mapping = self._open()
        others = mapping.table.on_image(image)
        lives = [self._life(mapping, other) for other in others]
        if any(
            other and other.alone and life is Life.LIVING
            for other, life in zip(others, lives, strict=True)
        ):
            return False
        return to_sharers or any(life is not Life.LIVING for life in lives)

    def _awaits_exit(self, holder: Holder, lack: NoSlot, deadline: float) -> bool:
        """Wait a moment where one whose end would make room is being killed; else return False."""
        in_the_way = self.holders(holder.kind)
        if isinstance(lack, NoImageSlot):
            in_the_way = [other for other in in_the_way if other.image == holder.image]
        if time.monotonic() >= deadline or not any(is_exiting(it.owner) for it in in_the_way):
            return False
        time.sleep(EXIT_STEP_SECONDS)
        return True

    def is_first(self, text: str) -> bool:
        """Tell whether no process of the server has logged this lately; now it has."""
        key = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8])
        try:
            with self._open().guard(_NOTE_SECONDS) as table:
                return table.note(key)
        except (OSError, StateUnavailable):
            return True  # better logged twice than never, or late

    @own_files(WHAT)
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

    def mend(self) -> None:
        """Write the header anew where it was damaged: without it no new worker could start.

        Safe, for no process may replace a table that this one has mapped.
        """
        if self._open().table.mend(tablefile.random_count()):
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

    @own_files(WHAT)
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
