# SPDX-License-Identifier: Apache-2.0
"""Slot tables over plain buffers, and holders to put into them."""

from imageserver.core.slots import SIZE, Holder, Kind, Owner, SlotTable, format_table

BOOT = b"0123456789abcdef"
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


def formatted() -> bytearray:
    buffer = bytearray(SIZE)
    format_table(memoryview(buffer), BOOT, 0, 0)
    return buffer


def opened(buffer: bytearray) -> SlotTable:
    return SlotTable(memoryview(buffer), BOOT, 0)


def counts(table: SlotTable) -> list[int]:
    return [table.count(kind) for kind in Kind]


def everyone(table: SlotTable) -> list[Holder]:
    return list(table.holders(*Kind))
