# SPDX-License-Identifier: Apache-2.0
"""A refusal is explained by who may have held what it wanted at the time, and by nobody else."""

import heapq
from random import Random

import pytest
from loading.ledger import LOST_SECONDS, Entry, Image, Kind, Ledger, Limits, Outcome, Verdict

from tests.system.harness import repeatable

DISK = Image("disk", is_nbd=True)
OTHER = Image("other", is_nbd=True)
FILE = Image("file", is_nbd=False)
DONE, LOST, NO_LOCK, NO_SLOT, NOTHING = Outcome


def ledger(readers: int = 2, writers: int = 1) -> Ledger:
    return Ledger(Limits(readers, writers))


def judged(found: list[Verdict]) -> list[tuple[Entry, bool]]:
    return [(verdict.entry, verdict.is_explained) for verdict in found]


def verdict_beside(
    holder: tuple[Kind, Image, Outcome], refused: tuple[Kind, Image, Outcome], writers: int = 1
) -> bool:
    """Refuse one request in the middle of another; tell whether that explains it."""
    book = ledger(readers=1, writers=writers)
    first = book.begin(*holder[:2], 0.0)
    second = book.begin(*refused[:2], 1.0)
    assert book.end(second, refused[2], 2.0) == []
    found = book.end(first, holder[2], 3.0)
    return dict(judged(found))[second]


# The lock


@pytest.mark.parametrize("holder", [kind for kind in Kind if kind is not Kind.READ])
@pytest.mark.parametrize("refused", [kind for kind in Kind if kind is not Kind.READ])
def test_any_locking_request_explains_a_busy_image_where_one_may_write(holder: Kind, refused: Kind):
    assert verdict_beside((holder, DISK, DONE), (refused, DISK, NO_LOCK))


def test_readers_and_requests_of_other_images_do_not_explain_a_busy_image():
    assert not verdict_beside((Kind.READ, DISK, DONE), (Kind.EXTENTS, DISK, NO_LOCK))
    assert not verdict_beside((Kind.WRITE, OTHER, DONE), (Kind.EXTENTS, DISK, NO_LOCK))


def test_a_reader_is_never_told_that_the_image_is_busy():
    assert not verdict_beside((Kind.REPLACE, DISK, DONE), (Kind.READ, DISK, NO_LOCK))


@pytest.mark.parametrize(
    ("outcome", "explains"),
    [(DONE, True), (LOST, True), (NO_SLOT, True), (NO_LOCK, False), (NOTHING, False)],
    ids=lambda value: value.name if isinstance(value, Outcome) else "",
)
def test_only_who_may_have_had_the_lock_explains_a_busy_image(outcome: Outcome, explains: bool):
    assert verdict_beside((Kind.WRITE, DISK, outcome), (Kind.EXTENTS, DISK, NO_LOCK)) is explains


def test_two_refusals_do_not_explain_each_other():
    book = ledger()
    one, two = (book.begin(Kind.EXTENTS, DISK, 0.0) for _ in range(2))
    assert book.end(one, NO_LOCK, 1.0) == []
    assert judged(book.end(two, NO_LOCK, 1.0)) == [(one, False), (two, False)]


# A lock that writers share


@pytest.mark.parametrize("holder", [Kind.WRITE, Kind.ZERO, Kind.FLUSH])
def test_writers_who_share_an_image_do_not_explain_each_other(holder: Kind):
    assert not verdict_beside((holder, DISK, DONE), (Kind.WRITE, DISK, NO_LOCK), writers=2)


@pytest.mark.parametrize("alone", [Kind.REPLACE, Kind.EXTENTS])
def test_who_wants_a_shared_image_alone_and_who_shares_it_explain_each_other(alone: Kind):
    assert verdict_beside((alone, DISK, DONE), (Kind.WRITE, DISK, NO_LOCK), writers=2)
    assert verdict_beside((Kind.WRITE, DISK, DONE), (alone, DISK, NO_LOCK), writers=2)


def test_who_wanted_a_shared_image_alone_had_its_lock_for_a_moment():
    refused = (Kind.EXTENTS, DISK, NO_LOCK)
    assert verdict_beside((Kind.REPLACE, DISK, NO_LOCK), refused, writers=2)
    assert not verdict_beside((Kind.WRITE, DISK, NO_LOCK), refused, writers=2)


def test_files_are_never_shared():
    assert verdict_beside((Kind.FLUSH, FILE, DONE), (Kind.FLUSH, FILE, NO_LOCK), writers=2)


# Slots


def test_reads_are_too_many_only_when_all_slots_may_be_taken_at_one_moment():
    book = ledger(readers=2)
    early = book.begin(Kind.READ, DISK, 0.0)
    refused = book.begin(Kind.READ, DISK, 1.0)
    book.end(early, DONE, 2.0)
    late = book.begin(Kind.READ, OTHER, 2.5)  # two overlap it, but not each other
    book.end(refused, NO_SLOT, 3.0)
    assert judged(book.end(late, DONE, 4.0)) == [(refused, False)]


def test_reads_of_any_images_take_the_slots():
    book = ledger(readers=2)
    holders = [book.begin(Kind.READ, image, 0.0) for image in (DISK, FILE)]
    refused = book.begin(Kind.READ, OTHER, 1.0)
    book.end(refused, NO_SLOT, 2.0)
    assert book.end(holders[0], DONE, 3.0) == []
    assert judged(book.end(holders[1], DONE, 3.0)) == [(refused, True)]


@pytest.mark.parametrize("outcome", [NO_SLOT, NOTHING], ids=lambda outcome: outcome.name)
def test_who_got_no_slot_explains_no_shortage(outcome: Outcome):
    assert not verdict_beside((Kind.READ, DISK, outcome), (Kind.READ, DISK, NO_SLOT))


def test_readers_do_not_take_write_slots_nor_writers_read_slots():
    assert not verdict_beside((Kind.READ, DISK, DONE), (Kind.WRITE, DISK, NO_SLOT))
    assert not verdict_beside((Kind.WRITE, DISK, DONE), (Kind.READ, DISK, NO_SLOT))
    assert verdict_beside((Kind.ZERO, DISK, DONE), (Kind.REPLACE, FILE, NO_SLOT))


@pytest.mark.parametrize("kind", [Kind.FLUSH, Kind.EXTENTS], ids=lambda kind: kind.name)
def test_who_needs_no_slot_is_never_refused_one(kind: Kind):
    assert not verdict_beside((Kind.WRITE, OTHER, DONE), (kind, DISK, NO_SLOT))


# Time


def test_a_request_that_had_ended_before_explains_nothing():
    book = ledger(readers=1)
    book.end(book.begin(Kind.READ, DISK, 0.0), DONE, 1.0)
    refused = book.begin(Kind.READ, DISK, 1.5)
    assert judged(book.end(refused, NO_SLOT, 2.0)) == [(refused, False)]


def test_a_request_that_broke_may_hold_on_for_a_while():
    book = ledger(readers=1)
    book.end(book.begin(Kind.READ, DISK, 0.0), LOST, 1.0)
    soon = book.begin(Kind.READ, DISK, LOST_SECONDS)
    assert judged(book.end(soon, NO_SLOT, LOST_SECONDS)) == [(soon, True)]
    late = book.begin(Kind.READ, DISK, LOST_SECONDS + 2)
    assert judged(book.end(late, NO_SLOT, LOST_SECONDS + 2)) == [(late, False)]


def test_at_the_end_of_a_run_who_is_still_open_may_hold():
    book = ledger(readers=1)
    book.begin(Kind.READ, DISK, 0.0)
    refused = book.begin(Kind.READ, DISK, 1.0)
    assert book.end(refused, NO_SLOT, 2.0) == []
    assert judged(book.close()) == [(refused, True)]
    assert book.close() == []


def test_what_is_over_is_forgotten():
    book = ledger()
    for second in range(1000):
        book.end(book.begin(Kind.READ, DISK, float(second)), DONE, second + 0.5)
    assert len(book._entries) <= 1


# A server that does as it should


class Perfect:
    """A server: requests begin, are decided a little later, and end a little after their work."""

    def __init__(self, choose: Random, readers: int, writers: int) -> None:
        self.choose = choose
        self.limits = Limits(readers, writers)
        self.book = Ledger(self.limits)
        self.held: list[tuple[Kind, Image]] = []
        self.verdicts: list[Verdict] = []
        self.begun = 0

    def run(self, requests: int) -> None:
        moments = [
            (self.choose.random() * requests / 20, n, "begin", None) for n in range(requests)
        ]
        heapq.heapify(moments)
        while moments:
            now, number, what, entry = heapq.heappop(moments)
            follows = getattr(self, what)(now, entry)
            if follows:
                delay = self.choose.choice((0.01, 0.1, 1.0)) * self.choose.random()
                heapq.heappush(moments, (now + delay, number, *follows))
        self.verdicts += self.book.close()

    def begin(self, now: float, _entry: None) -> tuple[str, object]:
        kind, image = self.choose.choice(list(Kind)), self.choose.choice((DISK, OTHER, FILE))
        return "decide", self.book.begin(kind, image, now)

    def decide(self, _now: float, entry: Entry) -> tuple[str, object]:
        slot = _slot(entry.kind)
        taken = sum(_slot(kind) == slot for kind, _ in self.held)
        locked = any(image == entry.image and kind is not Kind.READ for kind, image in self.held)
        if entry.kind is not Kind.READ and locked:
            return "end", (entry, NO_LOCK)
        if slot and taken >= getattr(self.limits, slot):
            return "end", (entry, NO_SLOT)
        self.held.append((entry.kind, entry.image))
        return "release", entry

    def release(self, _now: float, entry: Entry) -> tuple[str, object]:
        self.held.remove((entry.kind, entry.image))
        return "end", (entry, DONE)

    def end(self, now: float, ended: tuple[Entry, Outcome]) -> None:
        self.verdicts += self.book.end(*ended, now)


def _slot(kind: Kind) -> str:
    if kind is Kind.READ:
        return "readers"
    return "writers" if kind in {Kind.WRITE, Kind.ZERO, Kind.REPLACE} else ""


@pytest.mark.parametrize("seed", range(20))
def test_every_refusal_of_a_server_that_does_as_it_should_is_explained(seed: int):
    server = Perfect(repeatable(seed), readers=2, writers=1)
    server.run(300)
    assert len(server.verdicts) > 30
    assert [verdict for verdict in server.verdicts if not verdict.is_explained] == []


def test_refusals_of_a_server_with_lower_limits_than_it_says_are_not_all_explained():
    server = Perfect(repeatable(1), readers=2, writers=1)
    server.book = Ledger(Limits(4, 1))
    server.run(300)
    reads = [verdict for verdict in server.verdicts if verdict.entry.kind is Kind.READ]
    assert any(not verdict.is_explained for verdict in reads)
