# SPDX-License-Identifier: Apache-2.0
"""The slot table's bytes: what is ours, what fits, version 3 to the letter, and any damage."""

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.core.slots import (
    CAPACITY,
    NOTES,
    RECORD,
    SIZE,
    ForeignTable,
    Holder,
    IncompatibleTable,
    Kind,
    SlotTable,
    format_table,
)
from tests.unit.tables import BOOT, FULL, ME, OTHER, READER, counts, everyone, formatted, opened

STATES, RECORDS = 64, 64 + CAPACITY


def test_formatting_wipes_what_was_there() -> None:
    buffer = bytearray(b"\xff" * (SIZE + 8))

    format_table(memoryview(buffer), BOOT, 0, 0)

    assert counts(opened(buffer)) == [0, 0, 0, 0]
    assert buffer[SIZE:] == b"\xff" * 8


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((0, b"X"), id="magic"),
        pytest.param((8, struct.pack("=I", 2)), id="version"),
        pytest.param((12, struct.pack("=I", CAPACITY * 2)), id="capacity"),
        pytest.param((16, struct.pack("=I", RECORD + 8)), id="record-size"),
        pytest.param((20, b"\1"), id="padding"),
        pytest.param((24, b"x"), id="boot"),
        pytest.param((40, b"x"), id="namespace"),
        pytest.param((0, bytes(64)), id="all-zeros"),
    ],
)
def test_another_header_is_not_our_table(change: tuple[int, bytes]) -> None:
    buffer = formatted()
    at, new = change
    buffer[at : at + len(new)] = new

    with pytest.raises(IncompatibleTable):
        opened(buffer)


def test_a_table_of_another_boot_is_not_our_table() -> None:
    with pytest.raises(IncompatibleTable, match=r"^header is \(b'imgslots', 3, .*, b'0123"):
        SlotTable(memoryview(formatted()), BOOT[::-1], 0)


def test_a_table_of_another_namespace_is_told_from_other_strangers() -> None:
    with pytest.raises(ForeignTable, match="made in namespace 0x0, not 0x7"):
        SlotTable(memoryview(formatted()), BOOT, 7)


@pytest.mark.parametrize("size", [0, 63, SIZE - 1])
def test_a_buffer_too_small_is_not_our_table(size: int) -> None:
    with pytest.raises(IncompatibleTable, match=r"^too small$"):
        opened(formatted()[:size])


def test_a_closed_table_lets_go_of_its_buffer() -> None:
    buffer = formatted()

    opened(buffer).close()

    buffer.clear()  # BufferError while any view is left


def test_the_layout_is_that_of_version_3() -> None:
    """Servers of other versions read this file: where this fails, raise VERSION."""
    buffer = bytearray(SIZE)
    format_table(memoryview(buffer), BOOT, 0xF0000001F0000002, 0xFEDCBA9876543210)
    table = SlotTable(memoryview(buffer), BOOT, 0xF0000001F0000002)
    table.claim(FULL._replace(alone=True), 1)
    table.count_death()
    table.note(7)
    table.note(8)
    static = struct.pack(
        "=QQQ16s32s64s256s", 100, 7, FULL.started_ns, b"put", b"0" * 32, b"[2001:db8::1]:54321",
        FULL.transfer.encode(),
    )  # fmt: skip
    crc = zlib.crc32(static, 2)

    header = struct.pack("=8sIIII16sQ", b"imgslots", 3, 1024, 448, 0, BOOT, 0xF0000001F0000002)
    assert buffer[:48] == header
    assert buffer[48:64] == struct.pack("=QQ", 0xFEDCBA9876543210, 0xFEDCBA9876543211)
    assert buffer[64:RECORDS] == b"\2" + bytes(CAPACITY - 1)
    assert buffer[RECORDS : RECORDS + 24] == struct.pack("=QQII", 5, 100 << 40, crc, 1)
    notes = struct.pack("=QQQ", 2, 7, 8).ljust(8 * (1 + NOTES), b"\0")
    unused = bytes(SIZE - RECORDS - 24 - len(static) - len(notes))
    assert buffer[RECORDS + 24 :] == static + unused + notes


_TEXT_SIZES = {"operation": 16, "image": 32, "client": 64, "transfer": 256}


@pytest.mark.parametrize(("field", "size"), _TEXT_SIZES.items(), ids=_TEXT_SIZES.keys())
@pytest.mark.parametrize(
    ("letter", "width"),
    [("a", 1), ("\u00e9", 2), ("\u20ac", 3), ("\U0001f4be", 4)],
    ids=["ascii", "two-bytes", "three-bytes", "four-bytes"],
)
def test_a_text_longer_than_its_field_is_cut(
    field: str, size: int, letter: str, width: int
) -> None:
    table = opened(formatted())
    table.claim(Holder(Kind.READ, ME, **{field: "a" + letter * size}), 1)

    (shown,) = everyone(table)
    text = getattr(shown, field)
    # A character cut in two shows as U+FFFD; nothing else of the record is touched.
    assert text.rstrip("\ufffd") == "a" + letter * ((size - 1) // width)
    assert shown == Holder(Kind.READ, ME, **{field: text})


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
    buffer = formatted()
    before = opened(buffer)
    for number in range(CAPACITY if full else 8):
        before.claim(Holder(list(Kind)[number % 4], ME, "t", "get"), CAPACITY)
    for at, new in damage:
        buffer[at : at + len(new)] = new[: SIZE - at]
    try:
        table = opened(buffer)
    except IncompatibleTable:
        table = before  # a process that had it open already

    _use_every_method(table)
    table.sweep(lambda _: False)

    assert (counts(table), bytes(buffer[STATES:RECORDS])) == ([0, 0, 0, 0], bytes(CAPACITY))
    assert [table.claim(READER, 8) is None for _ in range(9)] == [False] * 8 + [True]


def _use_every_method(table: SlotTable) -> None:
    assert sum(counts(table)) <= CAPACITY
    assert len(everyone(table)) <= CAPACITY
    for index in range(12):
        table.release(index, OTHER, 0)
        table.set_progress(index, 1, 2)
        table.share(index)
    assert len(table.on_image(FULL.image)) <= CAPACITY
    table.claim(FULL, CAPACITY)
    assert len(table.sweep(lambda _: True)) <= CAPACITY
    assert sum(counts(table)) == len(everyone(table))


def test_the_latest_notes_are_known_and_older_ones_make_room() -> None:
    table = opened(formatted())

    assert all(table.note(key) for key in range(1, NOTES + 2))
    assert not any(table.note(key) for key in range(2, NOTES + 2))
    assert table.note(1)
    assert counts(table) == [0, 0, 0, 0]
