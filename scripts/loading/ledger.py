# SPDX-License-Identifier: Apache-2.0
"""Which refusals the limits explain. Values in, verdicts out: no I/O, no clock, no threads.

Every request that may take a lock or a slot is entered before its first byte is sent, and ended
after the last byte of its answer has come. The server takes what the request needs later than
the one and gives it back earlier than the other, so whatever was held at any moment is held by
a request that the ledger shows as open at that moment. A refusal is explained if, while its own
request was open, others may have held what it wanted:

    409 image busy                 one, with the lock of the same image
    503 too many parallel reads    at one moment ``max_readers`` of them, with read slots
    503 too many parallel writes   at one moment ``max_writers`` of them, with write slots

What a request may have held, its outcome says: who was refused did not hold what it was refused,
so two refusals never explain each other. That is why a refusal is judged only when all requests
that overlap it have ended.

    outcome        lock of the image        slot
    DONE           yes                      yes
    LOST           yes, and a while longer  yes, and a while longer
    NO_LOCK        no (*)                   no
    NO_SLOT        for a moment             no
    NOTHING        no                       no

(*) Where writers share an image, who wants it alone takes its lock to see who else has it.
"""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

#: For how long a server may go on with a request whose connection has broken: its client and
#: back-end timeouts, 60 s by default.
LOST_SECONDS = 120.0


class Kind(enum.Enum):
    """What a request does, as far as locks and slots go (docs/api.md, "Concurrency")."""

    READ = "read"
    WRITE = "write"
    ZERO = "zero"
    REPLACE = "replace"
    FLUSH = "flush"
    EXTENTS = "extents"


class Outcome(enum.Enum):
    """How a request ended."""

    DONE = "done, or failed after it was let in"
    LOST = "the connection broke"
    NO_LOCK = "409 image busy"
    NO_SLOT = "503 too many parallel reads or writes"
    NOTHING = "404, or another answer that comes before the lock"


#: Who takes the image's lock, which slot, and who shares the lock with its like.
_LOCKING = frozenset(Kind) - {Kind.READ}
_READING = frozenset({Kind.READ})
_WRITING = frozenset({Kind.WRITE, Kind.ZERO, Kind.REPLACE})
_SHARING = frozenset({Kind.WRITE, Kind.ZERO, Kind.FLUSH})
_REFUSED = frozenset({Outcome.NO_LOCK, Outcome.NO_SLOT})


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server."""

    readers: int
    writers: int


@dataclass(frozen=True, slots=True)
class Image:
    """What a lock belongs to: all ids of one image share it."""

    name: str
    is_nbd: bool


@dataclass(eq=False, slots=True)
class Entry:
    """A request: open from ``start`` to ``end``."""

    kind: Kind
    image: Image
    start: float
    end: float = math.inf
    outcome: Outcome | None = None

    def overlaps(self, other: "Entry") -> bool:
        """Tell whether both were open at some moment."""
        return self.start <= other.end and other.start <= self.end


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the refusal of a request is explained."""

    entry: Entry
    is_explained: bool


class Ledger:
    """All requests that may matter still."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: list[Entry] = []
        self._undecided: list[Entry] = []

    def begin(self, kind: Kind, image: Image, now: float) -> Entry:
        """Enter a request before its first byte is sent."""
        entry = Entry(kind, image, now)
        self._entries.append(entry)
        return entry

    def end(self, entry: Entry, outcome: Outcome, now: float) -> list[Verdict]:
        """Note the end of a request; return the refusals that can be judged now."""
        entry.outcome = outcome
        entry.end = now + LOST_SECONDS if outcome is Outcome.LOST else now
        if outcome in _REFUSED:
            self._undecided.append(entry)
        unended = [other for other in self._entries if other.outcome is None]
        verdicts = self._judge(
            refused
            for refused in self._undecided
            if not any(other.overlaps(refused) for other in unended)
        )
        self._forget(now)
        return verdicts

    def close(self) -> list[Verdict]:
        """Judge the other refusals, too: what has not ended may have held all it wanted."""
        return self._judge(self._undecided)

    def _judge(self, refused: Iterable[Entry]) -> list[Verdict]:
        verdicts = [Verdict(entry, self._is_explained(entry)) for entry in refused]
        decided = {id(verdict.entry) for verdict in verdicts}
        self._undecided = [entry for entry in self._undecided if id(entry) not in decided]
        return verdicts

    def _forget(self, now: float) -> None:
        """Drop the entries that can explain nothing any more."""
        relevant = [e for e in self._entries if e.outcome is None] + self._undecided
        horizon = min((entry.start for entry in relevant), default=now)
        self._entries = [e for e in self._entries if e.outcome is None or e.end >= horizon]

    def _is_explained(self, refused: Entry) -> bool:
        others = [e for e in self._entries if e is not refused and e.overlaps(refused)]
        if refused.outcome is Outcome.NO_LOCK:
            return refused.kind in _LOCKING and any(self._excludes(e, refused) for e in others)
        wanted = _READING if refused.kind in _READING else _WRITING
        if refused.kind not in wanted:
            return False
        limit = self._limits.readers if wanted is _READING else self._limits.writers
        holders = [e for e in others if e.kind in wanted and e.outcome in _HOLDING_A_SLOT]
        return _most_at_once(holders, refused) >= limit

    def _excludes(self, holder: Entry, refused: Entry) -> bool:
        """Tell whether one may have held the image's lock against the other."""
        if holder.image != refused.image or holder.kind not in _LOCKING:
            return False
        shares = self._limits.writers > 1 and holder.image.is_nbd
        if shares and {holder.kind, refused.kind} <= _SHARING:
            return False
        if holder.outcome is Outcome.NO_LOCK:
            return shares and holder.kind not in _SHARING and refused.kind not in _SHARING
        return holder.outcome is not Outcome.NOTHING


_HOLDING_A_SLOT = frozenset({None, Outcome.DONE, Outcome.LOST})


def _most_at_once(entries: list[Entry], during: Entry) -> int:
    """Return how many of these were open at one moment within another, at most."""
    # The count only rises where one starts: those moments, and the first, are all there is.
    moments = [max(during.start, entry.start) for entry in entries]
    return max((sum(e.start <= at <= e.end for e in entries) for at in moments), default=0)
