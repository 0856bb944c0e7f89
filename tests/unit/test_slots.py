# SPDX-License-Identifier: Apache-2.0
"""The slot table's rules over a plain buffer: exact limits, owners, sweeps, and any damage."""

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.slots import (
    CAPACITY,
    RECORD,
    SIZE,
    Holder,
    IncompatibleTable,
    Kind,
    Owner,
    SlotTable,
    format_table,
)

BOOT = b"0123456789abcdef"
STATES, RECORDS = 64, 64 + CAPACITY
ME, OTHER, THIRD = Owner(100, 7), Owner(200, 7), Owner(300, 9)
READER = Holder(Kind.READ, ME)
FULL = Holder(
    Kind.WRITE,
    ME,
    transfer="6fa459ea-ee8a-3ca4-894e-db77e160355e",
    operation="put",
    image="0" * 32,
    client="[2001:db8::1]:54321",
    started_ns=1_700_000_000_000_000_000,
    done=5,
    expected=100 << 40,
)


def _buffer() -> bytearray:
    buffer = bytearray(SIZE)
    format_table(memoryview(buffer), BOOT)
    return buffer


def _open(buffer: bytearray) -> SlotTable:
    return SlotTable(memoryview(buffer), BOOT)


@pytest.fixture
def table() -> SlotTable:
    return _open(_buffer())


def _counts(table: SlotTable) -> list[int]:
    return [table.count(kind) for kind in Kind]


def _all(table: SlotTable) -> list[Holder]:
    return list(table.holders(*Kind))


def test_formatting_wipes_what_was_there() -> None:
    buffer = bytearray(b"\xff" * (SIZE + 8))

    format_table(memoryview(buffer), BOOT)

    assert _counts(_open(buffer)) == [0, 0, 0, 0]
    assert buffer[SIZE:] == b"\xff" * 8


def test_what_was_claimed_is_shown_whole(table: SlotTable) -> None:
    table.claim(FULL, 1)

    assert _all(table) == [FULL]


def test_another_view_of_the_buffer_sees_it_too() -> None:
    buffer = _buffer()
    _open(buffer).claim(FULL, 1)

    assert _all(_open(buffer)) == [FULL]


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
    assert _counts(table) == [CAPACITY, 0, 0, 0]


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

    assert (table.release(index, owner, READER.started_ns), _all(table)) == (False, [READER])


def test_a_later_claim_of_the_same_record_is_not_released(table: SlotTable) -> None:
    index = table.claim(FULL, 1)
    assert index is not None

    assert (table.release(index, ME, FULL.started_ns - 1), _all(table)) == (False, [FULL])


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

    assert _all(table) == [READER]


def test_holders_are_those_of_the_kinds_asked_for(table: SlotTable) -> None:
    for kind in Kind:
        table.claim(Holder(kind, ME), 1)

    assert [h.kind for h in table.holders(Kind.WRITE, Kind.OTHER)] == [Kind.WRITE, Kind.OTHER]
    assert list(table.holders()) == []


def test_a_sweep_frees_the_dead_and_says_who_they_were(table: SlotTable) -> None:
    reused = Owner(ME.pid, ME.start - 1)  # its pid is ours now
    for owner in (ME, OTHER, ME, reused):
        table.claim(Holder(Kind.READ, owner), 8)

    freed = table.sweep(lambda owner: owner == ME)

    assert freed == [Holder(Kind.READ, OTHER), Holder(Kind.READ, reused)]
    assert _all(table) == [READER, READER]


def test_a_claim_cut_short_before_its_state_byte_leaves_no_trace(
    table: SlotTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(table, "_write", die)
    with pytest.raises(KeyboardInterrupt):
        table.claim(FULL, 1)
    monkeypatch.undo()

    assert (_counts(table), table.claim(READER, 1)) == ([0, 0, 0, 0], 0)


_PATTERN = {"operation": 16, "image": 32, "client": 64, "transfer": 256}


@pytest.mark.parametrize(("field", "size"), _PATTERN.items(), ids=_PATTERN.keys())
@pytest.mark.parametrize(
    ("letter", "width"),
    [("a", 1), ("\u00e9", 2), ("\u20ac", 3), ("\U0001f4be", 4)],
    ids=["ascii", "two-bytes", "three-bytes", "four-bytes"],
)
def test_a_text_longer_than_its_field_is_cut(
    table: SlotTable, field: str, size: int, letter: str, width: int
) -> None:
    table.claim(Holder(Kind.READ, ME, **{field: "a" + letter * size}), 1)

    (shown,) = _all(table)
    text = getattr(shown, field)
    # A character cut in two shows as U+FFFD; nothing else of the record is touched.
    assert text.rstrip("\ufffd") == "a" + letter * ((size - 1) // width)
    assert shown == Holder(Kind.READ, ME, **{field: text})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((0, b"X"), id="magic"),
        pytest.param((8, struct.pack("=I", 2)), id="version"),
        pytest.param((12, struct.pack("=I", CAPACITY * 2)), id="capacity"),
        pytest.param((16, struct.pack("=I", RECORD + 8)), id="record-size"),
        pytest.param((20, b"\1"), id="padding"),
        pytest.param((24, b"x"), id="boot"),
        pytest.param((0, bytes(64)), id="all-zeros"),
    ],
)
def test_another_header_is_not_our_table(change: tuple[int, bytes]) -> None:
    buffer = _buffer()
    at, new = change
    buffer[at : at + len(new)] = new

    with pytest.raises(IncompatibleTable):
        _open(buffer)


def test_a_table_of_another_boot_is_not_our_table() -> None:
    with pytest.raises(IncompatibleTable):
        SlotTable(memoryview(_buffer()), BOOT[::-1])


@pytest.mark.parametrize("size", [0, 63, SIZE - 1])
def test_a_buffer_too_small_is_not_our_table(size: int) -> None:
    with pytest.raises(IncompatibleTable):
        _open(_buffer()[:size])


def test_a_closed_table_lets_go_of_its_buffer() -> None:
    buffer = _buffer()

    _open(buffer).close()

    buffer.clear()  # BufferError while any view is left


def test_the_layout_is_that_of_version_1() -> None:
    """Servers of other versions read this file: where this fails, raise VERSION."""
    buffer = _buffer()
    _open(buffer).claim(FULL, 1)
    static = struct.pack(
        "=QQQ16s32s64s256s", 100, 7, FULL.started_ns, b"put", b"0" * 32, b"[2001:db8::1]:54321",
        FULL.transfer.encode(),
    )  # fmt: skip
    crc = zlib.crc32(static, 2)

    assert buffer[:40] == struct.pack("=8sIIII16s", b"imgslots", 1, 1024, 448, 0, BOOT)
    assert buffer[40:RECORDS] == bytes(24) + b"\2" + bytes(CAPACITY - 1)
    assert buffer[RECORDS : RECORDS + 24] == struct.pack("=QQII", 5, 100 << 40, crc, 0)
    assert buffer[RECORDS + 24 :] == static + bytes(SIZE - RECORDS - 24 - len(static))


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
    table, held = _open(_buffer()), {}
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

        assert _all(table) == [held[index] for index in sorted(held)]


_SPOTS = st.one_of(
    st.integers(0, STATES - 1),
    st.integers(STATES, STATES + 12),
    st.integers(STATES, RECORDS - 1),
    st.integers(RECORDS, RECORDS + 8 * RECORD),
    st.integers(0, SIZE - 1),
)
_DAMAGE = st.lists(st.tuples(_SPOTS, st.binary(min_size=1, max_size=40)), max_size=8)


@settings(max_examples=200, deadline=None)
@given(_DAMAGE, st.booleans())
def test_any_damage_is_survived_and_swept(damage: list[tuple[int, bytes]], full: bool) -> None:
    buffer = _buffer()
    before = _open(buffer)
    for number in range(CAPACITY if full else 8):
        before.claim(Holder(list(Kind)[number % 4], ME, "t", "get"), CAPACITY)
    for at, new in damage:
        buffer[at : at + len(new)] = new[: SIZE - at]
    try:
        table = _open(buffer)
    except IncompatibleTable:
        table = before  # a process that had it open already

    _use_every_method(table)
    table.sweep(lambda _: False)

    assert (_counts(table), bytes(buffer[STATES:RECORDS])) == ([0, 0, 0, 0], bytes(CAPACITY))
    assert [table.claim(READER, 8) is None for _ in range(9)] == [False] * 8 + [True]


def _use_every_method(table: SlotTable) -> None:
    assert sum(_counts(table)) <= CAPACITY
    assert len(_all(table)) <= CAPACITY
    for index in range(12):
        table.release(index, OTHER, 0)
        table.set_progress(index, 1, 2)
    table.claim(FULL, CAPACITY)
    assert len(table.sweep(lambda _: True)) <= CAPACITY
    assert sum(_counts(table)) == len(_all(table))
