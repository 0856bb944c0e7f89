# SPDX-License-Identifier: Apache-2.0
"""The slot table: who reads and writes now, over all processes, in one flat buffer.

    0        48             64              64 + CAPACITY                             SIZE
    | header | first, deaths | state bytes  | records of RECORD bytes each ... | notes |

A state byte is 0 (free) or a ``Kind``; the counts that limits are checked against are the
counts of state bytes, so there is no counter that could go wrong. A record says who holds
it (process and start time: pids are reused), for what, and how far it has come:

    Q done   Q expected   I crc   I alone   Q pid   Q start   Q started_ns   16s operation
    32s image key   64s client   256s transfer id

Rules: a record is written before its state byte; only ``done``, ``expected`` and ``alone`` change
afterwards, by their owner, as aligned stores that any process may read at any time.
The crc covers the rest: a record that does not match, a state byte that is no kind, or an
owner that is dead makes a record free at the next ``sweep``.

``deaths`` is raised before a record is freed whose owner may have left a write under way. It begins
with ``first``, a random number: a count of another table means nothing here. As long as it stays
the same, nobody has left anything but perhaps those whose records are still held.

This module knows the layout and the rules, over any buffer. It takes no lock, asks for no
pid and never waits: see ``runtime/slottable.py``. Each worker has a record, too (``Kind.WORKER``,
see ``workers.py``), so that one mechanism finds the dead.
"""

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

VERSION = 3
CAPACITY = 1024
_HEADER = struct.Struct("=8sIIII16sQ")
_MAGIC = b"imgslots"
_DEATHS = 48
_STATES = 64
RECORD = 448
_RECORDS = _STATES + CAPACITY
_NOTES = _RECORDS + CAPACITY * RECORD
#: How many of the latest notes are kept; see ``SlotTable.note``.
NOTES = 511
SIZE = _NOTES + 8 * (1 + NOTES)
_PROGRESS = struct.Struct("=QQII")
_STATIC = struct.Struct("=QQQ16s32s64s256s")
_IMAGE = slice(24 + 40, 24 + 40 + 32)
_STATIC_AT = _PROGRESS.size
_USED = _STATIC_AT + _STATIC.size
_TWO = struct.Struct("=QQ")
_ALONE_AT, _SHARED, _ALONE, _TOGETHER = 20, 0, 1, 2  # how its owner has a record's image
#: The pid in 8-byte words from a record's beginning; the start time and ``started_ns`` follow.
_PID = _STATIC_AT // 8


class Kind(IntEnum):
    """What a record is for. The values are the table's state bytes: never renumber."""

    READ = 1
    WRITE = 2
    OTHER = 3
    """Shown with the running transfers, but limited by the image's lock alone."""
    WORKER = 4


_KINDS = {int(kind): kind for kind in Kind}
#: The kinds of those who may hold an image.
_HOLDING = (Kind.READ, Kind.WRITE, Kind.OTHER)


class Owner(NamedTuple):
    """A process: its pid and its start time in clock ticks since boot (proc(5), field 22)."""

    pid: int
    start: int


class Holder(NamedTuple):
    """What a record says. ``started_ns``: monotonic clock; ``image``: ``locks.image_key``."""

    kind: Kind
    owner: Owner
    transfer: str = ""
    operation: str = ""
    image: str = ""
    client: str = ""
    started_ns: int = 0
    done: int = 0
    expected: int = 0
    alone: bool = False
    """It has its image's lock for as long as the record; otherwise it shares the image."""
    together: bool = False
    """It shares the image with others of which this is true, and with nobody else."""

    def age(self, now_ns: int) -> float:
        """Return for how many seconds it has been held, by the clock of ``started_ns``."""
        return max(0, now_ns - self.started_ns) / 1e9


class Occupant(NamedTuple):
    """Who has an image: the process, and whether it has the image alone, or together."""

    owner: Owner
    alone: bool
    together: bool = False


@dataclass(slots=True)  # not frozen, for that takes three times as long to make
class Deaths:
    """How many holders have left a write under way, perhaps; and the count when a table began."""

    first: int
    count: int


class IncompatibleTable(Exception):
    """The buffer holds something else, or a table of another version or boot."""


class ForeignTable(IncompatibleTable):
    """A table of another PID namespace: its pids name other processes here."""


def format_table(buffer: memoryview, boot: bytes, namespace: int, first: int) -> None:
    """Make ``buffer``, SIZE bytes, an empty table.

    ``boot`` (16 bytes) and ``namespace`` (64 bits) say where its pids and start times count.
    ``first``: 64 bits, random.
    """
    buffer[:SIZE] = bytes(SIZE)
    _TWO.pack_into(buffer, _DEATHS, first, first)
    _write_header(buffer, boot, namespace)


def mend_header(buffer: memoryview, boot: bytes, namespace: int, first: int) -> None:
    """Write the header of a table that was damaged, where somebody may have died unseen."""
    _TWO.pack_into(buffer, _DEATHS, first, _next(first))
    _write_header(buffer, boot, namespace)


def _write_header(buffer: memoryview, boot: bytes, namespace: int) -> None:
    _HEADER.pack_into(buffer, 0, _MAGIC, VERSION, CAPACITY, RECORD, 0, boot, namespace)


def _next(count: int) -> int:
    return (count + 1) & 0xFFFFFFFFFFFFFFFF


class SlotTable:
    """The rules over one buffer. Callers serialize ``claim``, ``sweep``, ``note``, ``mend``..."""

    def __init__(self, buffer: memoryview, boot: bytes, namespace: int) -> None:
        """Take a formatted buffer.

        Raises:
            ForeignTable: it was formatted in another namespace.
            IncompatibleTable: it was formatted otherwise.
        """
        if len(buffer) < SIZE:
            raise IncompatibleTable("too small")
        found = _HEADER.unpack_from(buffer)
        expected = (_MAGIC, VERSION, CAPACITY, RECORD, 0, boot, namespace)
        if found[:-1] == expected[:-1] and found != expected:
            raise ForeignTable(f"made in namespace {found[-1]:#x}, not {namespace:#x}")
        if found != expected:
            raise IncompatibleTable(f"header is {found}")
        self._buffer = buffer
        self._header = bytes(buffer[: _HEADER.size])
        self._deaths = buffer[_DEATHS:_STATES].cast("Q")
        self._states = buffer[_STATES : _STATES + CAPACITY]
        # Aligned: _RECORDS and RECORD are multiples of 8.
        self._words = buffer[_RECORDS:_NOTES].cast("Q")
        self._notes = buffer[_NOTES:SIZE].cast("Q")

    def is_damaged(self) -> bool:
        """Tell whether another program has written over the header."""
        return bool(self._buffer[: _HEADER.size] != self._header)

    def mend(self, first: int) -> bool:
        """Write the header anew where it was damaged, see ``mend_header``; True where it was."""
        if not self.is_damaged():
            return False
        *_, boot, namespace = _HEADER.unpack(self._header)
        mend_header(self._buffer, boot, namespace, first)
        return True

    def count(self, kind: Kind) -> int:
        """Return how many records of ``kind`` are held."""
        return bytes(self._states).count(kind)

    def claim(self, holder: Holder, limit: int) -> int | None:
        """Write ``holder`` to a free record and return its index; None where ``limit`` are held."""
        states = bytes(self._states)
        index = states.find(0)
        if index < 0 or states.count(holder.kind) >= limit:
            return None
        self._write(index, holder)
        self._states[index] = holder.kind
        return index

    def on_image(self, image: str, kind: Kind | None = None) -> list[Occupant | None]:
        """Return who holds an image, by its key, now; None: a damaged record that may be of it.

        Readers do only if alone or together. With a kind: whose records of it name the image.
        """
        indices = sorted(self._having(image, (kind,) if kind else _HOLDING))
        found = ((self._occupant(at), at) for at in indices if kind or self._has_image(at))
        # Not one released meanwhile.
        return [occupant for occupant, at in found if occupant is not None or self._states[at]]

    def _has_image(self, index: int) -> bool:
        alone = self._buffer[_RECORDS + index * RECORD + _ALONE_AT]
        return self._states[index] != Kind.READ or alone != _SHARED

    def count_on(self, image: str, kind: Kind) -> int:
        """Return how many records of ``kind`` are held that name an image, by its key."""
        return sum(1 for _ in self._having(image, (kind,)))

    def _having(self, image: str, kinds: Iterable[Kind]) -> Iterator[int]:
        wanted = struct.pack("32s", *_encoded(image))
        states = bytes(self._states)
        for kind in kinds:
            index = states.find(kind)
            while index >= 0:
                at = _RECORDS + index * RECORD
                if self._buffer[at + _IMAGE.start : at + _IMAGE.stop] == wanted:
                    yield index
                index = states.find(kind, index + 1)

    def deaths(self) -> Deaths:
        """Return what is known of the dead now."""
        return Deaths(self._deaths[0], self._deaths[1])

    def count_death(self) -> None:
        """Say that somebody may have left a write under way, before his record is freed."""
        self._deaths[1] = _next(self._deaths[1])

    def share(self, index: int) -> None:
        """Say that the record's owner, who had its image alone, shares it from now on."""
        self._buffer[_RECORDS + index * RECORD + _ALONE_AT] = _SHARED

    def release(self, index: int, owner: Owner, started_ns: int) -> bool:
        """Free the record that this owner claimed at ``started_ns``; False where it has lost it.

        One store to a record of the caller's own: safe without the guard, so never delayed.
        """
        at = _word(index)
        words = self._words
        found = words[at + _PID], words[at + _PID + 1], words[at + _PID + 2]
        if not self._states[index] or found != (owner.pid, owner.start, started_ns):
            return False
        self._states[index] = 0
        return True

    def sweep(self, is_alive: Callable[[Owner], bool]) -> list[Holder | None]:
        """Free records of the dead, and damaged ones; return what they said, None for these."""
        freed: list[Holder | None] = []
        for index, state in enumerate(bytes(self._states)):
            if not state:
                continue
            holder = self._read(index)
            if holder is None and not self._states[index]:
                continue  # released meanwhile, which takes no guard
            if holder is None or not is_alive(holder.owner):
                if not freed:
                    self.count_death()
                self._states[index] = 0
                freed.append(holder)
        return freed

    def holders(self, *kinds: Kind) -> Iterator[Holder]:
        """Yield what is held now, of these kinds. A snapshot: safe without the guard."""
        wanted = set(kinds)
        for index, state in enumerate(bytes(self._states)):
            if state in wanted:
                holder = self._read(index)
                if holder is not None and holder.kind in kinds:
                    yield holder

    def note(self, key: int) -> bool:
        """Remember ``key``, 64 bits, for one process to log; False where it is known already."""
        count, *notes = self._notes
        if key in notes:
            return False
        self._notes[1 + count % NOTES] = key
        self._notes[0] = (count + 1) % NOTES
        return True

    def set_progress(self, index: int, done: int, expected: int) -> None:
        """Store how far a record's owner has come: two aligned 8-byte stores, no guard needed."""
        self._words[_word(index)] = done
        self._words[_word(index) + 1] = expected

    def close(self) -> None:
        """Release the buffer: a mapping with views of it cannot be closed."""
        for view in (self._words, self._notes, self._states, self._deaths, self._buffer):
            view.release()

    def _write(self, index: int, holder: Holder) -> None:
        names = _encoded(holder.operation, holder.image, holder.client, holder.transfer)
        static = _STATIC.pack(*holder.owner, holder.started_ns, *names)
        crc = zlib.crc32(static, holder.kind)
        at = _RECORDS + index * RECORD
        how = _TOGETHER if holder.together else _ALONE if holder.alone else _SHARED
        _PROGRESS.pack_into(self._buffer, at, holder.done, holder.expected, crc, how)
        self._buffer[at + _STATIC_AT : at + _USED] = static

    def _read(self, index: int) -> Holder | None:
        kind, record = self._whole(index)
        if kind is None:
            return None
        static = _STATIC.unpack_from(record, _STATIC_AT)
        pid, start, started_ns, operation, image, client, transfer = static
        done, expected = self._words[_word(index)], self._words[_word(index) + 1]
        told = _text(transfer), _text(operation), _text(image), _text(client), started_ns
        how = record[_ALONE_AT] == _ALONE, record[_ALONE_AT] == _TOGETHER
        return Holder(kind, Owner(pid, start), *told, done, expected, *how)

    def _occupant(self, index: int) -> Occupant | None:
        kind, record = self._whole(index)
        owner = Owner(*_TWO.unpack_from(record, _STATIC_AT))
        how = record[_ALONE_AT]
        return Occupant(owner, how == _ALONE, how == _TOGETHER) if kind else None

    def _whole(self, index: int) -> tuple[Kind | None, bytes]:
        """Return a record and its kind; None: it is free, or damaged."""
        kind = _KINDS.get(self._states[index])
        at = _RECORDS + index * RECORD
        record = bytes(self._buffer[at : at + _USED])
        _, _, crc, _ = _PROGRESS.unpack_from(record)
        if kind and crc != zlib.crc32(record[_STATIC_AT:], kind):
            kind = None
        return kind, record


def _word(index: int) -> int:
    return index * RECORD // 8  # where a record begins, in 8-byte words


@lru_cache(256)  # a client's requests for an image come one after the other
def _encoded(*texts: str) -> list[bytes]:
    return [text.encode(errors="replace") for text in texts]  # cut where they are packed


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
