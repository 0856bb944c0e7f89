# SPDX-License-Identifier: Apache-2.0
"""Who has an image, by the slot table; and what is known of those who died with it.

A holder ``X`` dies with a write under way, perhaps. ``N`` takes the image next: its slot's
``deaths`` are others than before, whatever comes first of X's death, sweep and N's claim.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.core.errors import ImageBusy, NoSlot, StateUnavailable
from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind, Owner
from imageserver.runtime import mapping, slottable
from imageserver.runtime.processes import Life
from imageserver.runtime.slottable import SharedTable
from tests.unit.processes import holder, stopped_in_guard

LIMITS = {Kind.READ: 3, Kind.WRITE: 8}
TICKET = Ticket("t1", "write", "key", "192.0.2.1")


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedTable]:
    table = SharedTable(str(tmp_path), LIMITS)
    yield table
    table.close()


# Who has it


@pytest.mark.parametrize("first_alone", [False, True])
@pytest.mark.parametrize("second_alone", [False, True])
def test_an_image_is_shared_or_one_has_it_alone(
    table: SharedTable, first_alone: bool, second_alone: bool
) -> None:
    first = table.claim(Kind.WRITE, TICKET, alone=first_alone)

    if first_alone or second_alone:
        with pytest.raises(ImageBusy):
            table.claim(Kind.OTHER, TICKET, alone=second_alone)
        assert table.count(Kind.OTHER) == 0
    else:
        table.claim(Kind.OTHER, TICKET).release()
    table.claim(Kind.WRITE, Ticket("t2", "write", "other", ""), alone=True).release()
    first.release()
    table.claim(Kind.WRITE, TICKET, alone=True).release()


def test_who_reads_names_no_image_and_is_in_nobodys_way(table: SharedTable) -> None:
    table.claim(Kind.READ, Ticket("t1", "read", "", ""))
    table.claim(Kind.OTHER, Ticket("t1", "extents", "", ""), alone=True)

    table.claim(Kind.WRITE, Ticket("t1", "write", "", ""), alone=True)


@pytest.mark.parametrize("others", [{}, {"alone": True}], ids=["shared", "alone"])
def test_those_who_have_an_image_together_let_nobody_else_in(
    table: SharedTable, others: dict[str, bool]
) -> None:
    together = [table.claim(Kind.READ, TICKET, together=True) for _ in range(2)]
    with pytest.raises(ImageBusy):
        table.claim(Kind.WRITE, TICKET, **others)
    for slot in together:
        slot.release()

    other = table.claim(Kind.WRITE, TICKET, **others)
    with pytest.raises(ImageBusy):
        table.claim(Kind.READ, TICKET, together=True)
    table.claim(Kind.READ, TICKET).release()
    other.release()


def test_who_had_it_alone_and_shares_it_lets_others_in(table: SharedTable) -> None:
    table.claim(Kind.WRITE, TICKET, alone=True).share()

    table.claim(Kind.WRITE, TICKET).release()


def test_that_an_image_is_taken_is_told_before_that_there_is_no_room(table: SharedTable) -> None:
    held = [table.claim(Kind.WRITE, TICKET) for _ in range(8)]

    with pytest.raises(ImageBusy):
        table.claim(Kind.WRITE, TICKET, alone=True)
    with pytest.raises(NoSlot):
        table.claim(Kind.WRITE, TICKET)
    assert len(held) == table.count(Kind.WRITE)


def test_a_process_that_lives_keeps_its_image(tmp_path: Path, table: SharedTable) -> None:
    with holder(tmp_path, Kind.WRITE):
        before = table.claim(Kind.WRITE, TICKET)
        with pytest.raises(ImageBusy):
            table.claim(Kind.WRITE, TICKET, alone=True)
        before.release()


# Who lets go of its lock in a moment


@pytest.mark.parametrize(
    ("held", "to_sharers", "to_others"),
    [
        pytest.param(None, True, False, id="nobody-shows"),
        pytest.param("shared", True, False, id="shared"),
        pytest.param("together", True, False, id="together"),
        pytest.param("alone", False, False, id="alone"),
    ],
)
def test_who_shares_or_does_not_show_yet_gives_way_to_sharers(
    table: SharedTable, held: str | None, to_sharers: bool, to_others: bool
) -> None:
    if held:
        how = {} if held == "shared" else {held: True}
        table.claim(Kind.WRITE, TICKET, **how)

    asked = [table.gives_way("key", to_sharers=asks) for asks in (True, False)]
    assert asked == [to_sharers, to_others]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("life", [Life.EXITING, Life.DEAD])
def test_who_dies_gives_way_to_all(
    tmp_path: Path,
    table: SharedTable,
    monkeypatch: pytest.MonkeyPatch,
    life: Life,
    alone: bool,
) -> None:
    monkeypatch.setattr(slottable, "life_of", lambda _: life)
    with holder(tmp_path, Kind.WRITE, alone=alone):
        assert table.gives_way("key", to_sharers=False)


# The dead


def _deaths(table: SharedTable) -> int:
    """Return what the next holder of the image is told."""
    slot = table.claim(Kind.WRITE, TICKET)
    slot.release()
    return slot.deaths.count


@pytest.mark.parametrize("alone", [False, True], ids=["shared", "alone"])
@pytest.mark.parametrize("next_alone", [False, True], ids=["to-share", "to-have-alone"])
@pytest.mark.parametrize("swept", [False, True], ids=["found-dead", "swept-before"])
def test_who_comes_after_the_dead_knows_it(
    tmp_path: Path, table: SharedTable, alone: bool, next_alone: bool, swept: bool
) -> None:
    before = _deaths(table)
    with holder(tmp_path, Kind.WRITE, alone=alone) as process:
        process.kill()
        process.wait(10)
        if swept:
            assert table.sweep() == 1
        slot = table.claim(Kind.WRITE, TICKET, alone=next_alone)

    assert slot.deaths.count != before
    assert len(table.holders(Kind.WRITE)) == 1


def test_who_comes_before_a_death_knows_nothing_of_it_and_who_comes_after_does(
    tmp_path: Path, table: SharedTable
) -> None:
    """N may settle and note what it knew: that is not what M is told, whoever sweeps."""
    with holder(tmp_path, Kind.WRITE) as process:
        known = table.claim(Kind.WRITE, TICKET)
        process.kill()
        process.wait(10)
        known_later = _deaths(table)

    assert known.deaths.count != known_later
    assert _deaths(table) == known_later


def test_the_dying_are_waited_for_before_they_count(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock may be free, its connection still open: what it leaves cannot be seen yet."""
    before = _deaths(table)
    with holder(tmp_path, Kind.WRITE) as process:
        lives = [Life.EXITING, Life.EXITING]
        held: list[int] = []

        def look(_owner: Owner) -> Life:
            if lives:
                return lives.pop(0)
            process.kill()
            process.wait(10)
            return Life.DEAD

        def sleep(_seconds: float) -> None:
            held.append(table.count(Kind.WRITE))

        monkeypatch.setattr(slottable, "life_of", look)
        clock = SimpleNamespace(
            sleep=sleep, monotonic=time.monotonic, monotonic_ns=time.monotonic_ns
        )
        monkeypatch.setattr(slottable, "time", clock)
        slot = table.claim(Kind.WRITE, TICKET)

    # While it waits, it has no slot of its own.
    assert (held, slot.deaths.count != before) == ([1, 1], True)


@pytest.mark.parametrize("alone", [False, True])
def test_a_holder_that_does_not_end_its_dying_keeps_its_image(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    monkeypatch.setattr(slottable, "life_of", lambda _: Life.EXITING)
    monkeypatch.setattr(slottable, "EXIT_SECONDS", 0.01)
    with holder(tmp_path, Kind.WRITE):
        with pytest.raises(ImageBusy):
            table.claim(Kind.WRITE, TICKET, alone=alone)

        assert table.count(Kind.WRITE) == 1


def test_where_it_cannot_be_told_how_others_are_no_slot_is_kept(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor(_owner: Owner) -> Life:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(slottable, "life_of", no_descriptor)
    with holder(tmp_path, Kind.WRITE):
        with pytest.raises(StateUnavailable, match=r"slot table cannot .*: Too many open"):
            table.claim(Kind.WRITE, TICKET)
        assert table.count(Kind.WRITE) == 1


def test_a_record_that_others_have_damaged_is_one_of_the_dead(
    tmp_path: Path, table: SharedTable
) -> None:
    before = _deaths(table)
    table.claim(Kind.WRITE, TICKET, alone=True)
    data = bytearray((tmp_path / "slots").read_bytes())
    at = data.index(b"write\0")
    with open(tmp_path / "slots", "r+b") as file:
        file.seek(at)
        file.write(b"W")

    slot = table.claim(Kind.WRITE, TICKET, alone=True)
    assert slot.deaths.count != before


# Those who live, and leave a write under way


@pytest.mark.parametrize("settled", [True, False])
def test_who_gives_up_with_a_write_under_way_counts_like_one_that_died(
    table: SharedTable, settled: bool
) -> None:
    before = _deaths(table)
    table.claim(Kind.WRITE, TICKET).release(settled=settled)

    assert (_deaths(table) == before) is settled


def test_it_is_counted_before_its_slot_is_free(
    table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    really = mapping.Mapping.count_death

    def count_death(self: mapping.Mapping) -> None:
        really(self)
        held.append(self.table.count(Kind.WRITE))

    monkeypatch.setattr(mapping.Mapping, "count_death", count_death)
    table.claim(Kind.WRITE, TICKET).release(settled=False)

    assert (held, table.count(Kind.WRITE)) == ([1], 0)


def test_it_is_counted_soon_though_another_process_is_stopped_within_the_guard(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "BRIEF_SECONDS", 0.01)
    before = _deaths(table)
    slot = table.claim(Kind.WRITE, TICKET)
    with stopped_in_guard(tmp_path):
        began = time.monotonic()
        slot.release(settled=False)
        assert time.monotonic() - began < 1

    assert _deaths(table) != before
