# SPDX-License-Identifier: Apache-2.0
"""The slot table's rules over a plain buffer: exact limits, owners, progress, sweeps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.core.slots import (
    CAPACITY,
    SIZE,
    Deaths,
    Holder,
    Kind,
    Occupant,
    Owner,
    SlotTable,
    format_table,
)
from tests.unit.tables import (
    BOOT,
    FULL,
    ME,
    OTHER,
    READER,
    THIRD,
    counts,
    everyone,
    formatted,
    opened,
)


@pytest.fixture
def table() -> SlotTable:
    return opened(formatted())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"alone": True},
        {"together": True},
        {"transfer": "X" * 8, "client": "\u20ac"},
        {"operation": "", "client": ""},
    ],
)
def test_what_was_claimed_is_shown_whole(table: SlotTable, changed: dict[str, object]) -> None:
    holder = FULL._replace(**changed)
    table.claim(holder, 1)

    assert everyone(table) == [holder]


def test_a_text_that_is_not_utf_8_is_shown_as_well_as_it_can_be(table: SlotTable) -> None:
    table.claim(FULL._replace(transfer="disk\udcff"), 1)

    assert everyone(table) == [FULL._replace(transfer="disk?")]


def test_another_view_of_the_buffer_sees_it_too() -> None:
    buffer = formatted()
    opened(buffer).claim(FULL, 1)

    assert everyone(opened(buffer)) == [FULL]


@pytest.mark.parametrize("limit", [0, 1, 8, 512])
@pytest.mark.parametrize("kind", Kind)
def test_exactly_the_limit_is_granted(table: SlotTable, kind: Kind, limit: int) -> None:
    granted = [table.claim(Holder(kind, ME), limit) for _ in range(limit + 2)]

    assert [index is not None for index in granted] == [True] * limit + [False] * 2
    assert table.count(kind) == limit


def test_kinds_have_limits_of_their_own(table: SlotTable) -> None:
    table.claim(READER, 1)

    assert [table.claim(Holder(k, ME), 1) is None for k in (Kind.WRITE, Kind.READ)] == [False, True]


def test_a_full_table_refuses_whatever_the_limit(table: SlotTable) -> None:
    for _ in range(CAPACITY):
        table.claim(READER, CAPACITY + 1)

    assert table.claim(FULL, CAPACITY + 1) is None
    assert counts(table) == [CAPACITY, 0, 0, 0]


def test_a_released_slot_is_free_again(table: SlotTable) -> None:
    index = table.claim(READER, 1)
    assert index is not None

    assert (table.release(index, ME, READER.started_ns), table.count(Kind.READ)) == (True, 0)
    assert table.claim(READER, 1) is not None


@pytest.mark.parametrize(
    "owner",
    [
        pytest.param(OTHER, id="another-process"),
        pytest.param(Owner(ME.pid, ME.start + 1), id="reused-pid"),
    ],
)
def test_only_the_owner_releases(table: SlotTable, owner: Owner) -> None:
    index = table.claim(READER, 1)
    assert index is not None

    assert (table.release(index, owner, READER.started_ns), everyone(table)) == (False, [READER])


def test_a_later_claim_of_the_same_record_is_not_released(table: SlotTable) -> None:
    index = table.claim(FULL, 1)
    assert index is not None

    assert (table.release(index, ME, FULL.started_ns - 1), everyone(table)) == (False, [FULL])


def test_releasing_twice_is_refused(table: SlotTable) -> None:
    table.claim(READER, 1)

    assert [table.release(0, ME, READER.started_ns) for _ in range(2)] == [True, False]


def test_progress_shows_in_the_holders(table: SlotTable) -> None:
    first, second = table.claim(FULL, 2), table.claim(FULL, 2)
    assert first is not None
    assert second is not None

    table.set_progress(first, 10, 2**64 - 1)

    shown = [(h.done, h.expected) for h in table.holders(Kind.WRITE)]
    assert shown == [(10, 2**64 - 1), (FULL.done, FULL.expected)]


def test_progress_leaves_a_record_valid(table: SlotTable) -> None:
    index = table.claim(FULL, 1)
    assert index is not None
    table.set_progress(index, 1, 2)

    assert table.sweep(lambda _: True) == []
    assert table.release(index, ME, FULL.started_ns) is True


def test_a_new_claim_does_not_inherit_progress(table: SlotTable) -> None:
    index = table.claim(READER, 1)
    assert index is not None
    table.set_progress(index, 10, 20)
    table.release(index, ME, READER.started_ns)
    table.claim(READER, 1)

    assert everyone(table) == [READER]


def test_holders_are_those_of_the_kinds_asked_for(table: SlotTable) -> None:
    for kind in Kind:
        table.claim(Holder(kind, ME), 1)

    assert [h.kind for h in table.holders(Kind.WRITE, Kind.OTHER)] == [Kind.WRITE, Kind.OTHER]
    assert list(table.holders()) == []


def test_who_has_an_image_is_found_by_its_key(table: SlotTable) -> None:
    mine = FULL._replace(image="a" * 32, alone=True)
    theirs = Holder(Kind.OTHER, OTHER, image="a" * 32)
    whole = Holder(Kind.READ, OTHER, image="a" * 32, alone=True)
    for held in (
        FULL,
        mine,
        Holder(Kind.READ, ME, image=""),
        Holder(Kind.READ, ME, image="a" * 32),
        whole._replace(image="b" * 32),
        whole,
        whole._replace(alone=False, together=True),
        theirs,
        FULL._replace(image=""),
    ):
        table.claim(held, 8)

    found = [Occupant(holder.owner, holder.alone) for holder in (mine, whole, theirs)]
    found.insert(2, Occupant(whole.owner, alone=False, together=True))
    assert table.on_image("a" * 32) == found
    assert table.on_image("a" * 31) == []


def test_records_of_a_kind_are_counted_by_the_image_that_they_name(table: SlotTable) -> None:
    one, other = "a" * 32, "a" * 31 + "b"
    held = [table.claim(READER._replace(image=one), 99) for _ in range(4)]
    for holder in (READER._replace(image=other), READER, FULL._replace(image=one)):
        table.claim(holder, 99)
    assert held[2] is not None
    table.release(held[2], ME, 0)

    assert [table.count_on(image, Kind.READ) for image in (one, other, "")] == [3, 1, 1]
    assert table.count_on(one, Kind.WRITE) == 1
    assert table.on_image(one, Kind.READ) == [Occupant(READER.owner, alone=False)] * 3


def test_a_damaged_record_counts_for_the_image_that_it_names_until_it_is_swept() -> None:
    buffer = formatted()
    table = opened(buffer)
    table.claim(FULL, 1)
    buffer[buffer.index(b"put")] ^= 1

    assert table.count_on(FULL.image, Kind.WRITE) == 1
    table.sweep(lambda _: True)
    assert table.count_on(FULL.image, Kind.WRITE) == 0


def test_who_had_an_image_alone_may_share_it(table: SlotTable) -> None:
    table.claim(READER, 1)  # so that it is not the first record's
    index = table.claim(FULL._replace(alone=True), 1)
    assert index is not None
    table.share(index)

    assert table.on_image(FULL.image) == [Occupant(FULL.owner, alone=False)]
    assert table.release(index, ME, FULL.started_ns)


def test_a_damaged_record_may_be_of_any_image_that_it_names() -> None:
    buffer = formatted()
    table = opened(buffer)
    table.claim(FULL, 1)
    buffer[buffer.index(b"put")] ^= 1

    assert table.on_image(FULL.image) == [None]


def test_one_that_lets_go_while_it_is_looked_at_is_no_damaged_one(
    table: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    really, left = table._whole, [FULL]

    def late(index: int) -> tuple[Kind | None, bytes]:
        if left:
            assert table.release(index, ME, left.pop().started_ns)
        return really(index)

    first = table.deaths()
    for holder in (FULL, FULL._replace(owner=OTHER)):
        table.claim(holder, 2)
    monkeypatch.setattr(table, "_whole", late)

    assert table.on_image(FULL.image) == [Occupant(OTHER, alone=False)]
    assert table.deaths() == first
    table.claim(FULL, 2)
    left.append(FULL)
    assert table.sweep(lambda _: False) == [FULL._replace(owner=OTHER)]


def test_deaths_are_counted_before_the_dead_are_freed(table: SlotTable) -> None:
    """Whoever does not find the record any more must find the count."""
    first = table.deaths()
    for owner in (OTHER, OTHER, ME):
        table.claim(FULL._replace(owner=owner), 3)
    seen = []

    def is_alive(owner: Owner) -> bool:
        seen.append((table.deaths() == first, table.count(Kind.WRITE)))
        return owner == ME

    table.sweep(is_alive)
    assert table.deaths() == Deaths(first.first, first.count + 1)
    assert seen == [(True, 3), (False, 2), (False, 1)]


def test_what_ends_well_is_no_death(table: SlotTable) -> None:
    first = table.deaths()
    table.claim(FULL, 1)
    table.sweep(lambda _: True)
    table.release(0, ME, FULL.started_ns)
    table.sweep(lambda _: False)

    assert table.deaths() == first


def test_a_count_of_deaths_starts_over_at_its_end() -> None:
    buffer = bytearray(SIZE)
    format_table(memoryview(buffer), BOOT, 0, 2**64 - 1)
    table = opened(buffer)
    table.count_death()

    assert table.deaths() == Deaths(2**64 - 1, 0)


def test_a_sweep_frees_the_dead_and_says_who_they_were(table: SlotTable) -> None:
    reused = Owner(ME.pid, ME.start - 1)  # its pid is ours now
    for owner in (ME, OTHER, ME, reused):
        table.claim(Holder(Kind.READ, owner), 8)

    freed = table.sweep(lambda owner: owner == ME)

    assert freed == [Holder(Kind.READ, OTHER), Holder(Kind.READ, reused)]
    assert everyone(table) == [READER, READER]


def test_a_claim_cut_short_before_its_state_byte_leaves_no_trace(
    table: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(table, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        table.claim(FULL, 1)
    monkeypatch.undo()

    assert (counts(table), table.claim(READER, 1)) == ([0, 0, 0, 0], 0)


_OPERATIONS = st.one_of(
    st.tuples(st.just("claim"), st.sampled_from(Kind), st.sampled_from([ME, OTHER, THIRD])),
    st.tuples(st.just("release"), st.integers(0, 12), st.sampled_from([ME, OTHER, THIRD])),
    st.tuples(st.just("kill"), st.none(), st.sampled_from([ME, OTHER, THIRD])),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(_OPERATIONS, max_size=40), st.integers(1, 3))
def test_any_history_holds_exactly_what_a_dictionary_would(
    operations: list[tuple[str, object, Owner]], limit: int
) -> None:
    table, held = opened(formatted()), {}
    for name, argument, owner in operations:
        if name == "claim":
            index = table.claim(Holder(argument, owner), limit)
            full = sum(h.kind is argument for h in held.values()) == limit
            assert (index is None) == full
            if index is not None:
                assert index not in held
                held[index] = Holder(argument, owner)
        elif name == "release":
            mine = argument in held and held[argument].owner == owner
            assert table.release(argument, owner, 0) == mine
            if mine:
                del held[argument]
        else:
            table.sweep(lambda asked, dead=owner: asked != dead)
            held = {i: h for i, h in held.items() if h.owner != owner}

        assert everyone(table) == [held[index] for index in sorted(held)]


def test_an_age_is_never_negative() -> None:
    held = READER._replace(started_ns=5_000_000_000)

    assert [held.age(now) for now in (7_500_000_000, 5_000_000_000, 0)] == [2.5, 0, 0]
