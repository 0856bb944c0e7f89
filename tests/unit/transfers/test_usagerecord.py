# SPDX-License-Identifier: Apache-2.0
"""The bytes of a record of use: read as they were written, or no record at all."""

import random
from dataclasses import replace

import pytest

from imageserver.core.ports import Account
from imageserver.transfers.usagerecord import (
    CHANGED,
    SIZE,
    DamagedRecord,
    fresh_record,
    pack_record,
    parse_record,
)

BOOT = bytes(range(16))
NOW = 1000
FULL = replace(
    fresh_record(NOW, "\u00fcber" * 50),
    cut_ns=7,
    is_closed=True,
    account=Account(1 << 40, 3, "BackendError: gone"),
    changed_ns=1_700_000_000_000_000_000,
)


def test_a_record_is_read_as_it_was_written() -> None:
    for record in (FULL, fresh_record(0, "x")):
        data = pack_record(record, BOOT)
        assert (len(data), parse_record(data, BOOT, NOW)) == (SIZE, record)


def test_a_record_of_an_older_version_lacks_the_change_only() -> None:
    assert parse_record(pack_record(FULL, BOOT)[:CHANGED], BOOT, NOW) == replace(FULL, changed_ns=0)


@pytest.mark.parametrize("size", [0, 1, 8, 23, 24, 30, 48, 320, CHANGED - 1])
def test_a_record_cut_short_is_none(size: int) -> None:
    with pytest.raises(DamagedRecord):
        parse_record(pack_record(FULL, BOOT)[:size], BOOT, NOW)


def test_a_record_of_another_boot_or_of_a_time_to_come_is_none() -> None:
    data = pack_record(FULL, BOOT)
    for boot, now in ((bytes(16), NOW), (BOOT, NOW - 1)):
        with pytest.raises(DamagedRecord):
            parse_record(data, boot, now)


def test_whatever_the_bytes_nothing_else_is_raised() -> None:
    choose = random.Random(12)  # noqa: S311 - no secret
    parsed = 0
    for _ in range(3000):
        data = bytearray(pack_record(FULL, BOOT))
        for _ in range(choose.randrange(1, 20)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        try:
            record = parse_record(bytes(data[: choose.randrange(SIZE + 8)]), BOOT, NOW)
        except DamagedRecord:
            continue
        parsed += 1
        assert len(pack_record(replace(record, transfer_id="x"), BOOT)) == SIZE
    assert parsed


def test_sums_stop_at_the_largest_that_there_is() -> None:
    most = replace(FULL, account=Account(1 << 70, (1 << 64) - 1))
    assert parse_record(pack_record(most, BOOT), BOOT, NOW).account == Account(
        (1 << 64) - 1, (1 << 64) - 1
    )
