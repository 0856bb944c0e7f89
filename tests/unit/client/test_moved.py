# SPDX-License-Identifier: Apache-2.0
"""Digests of blocks while they move: right where all came in order, and never wrong."""

import hashlib
import random

import pytest

from imageserver.client.moving.moved import MovedBlocks
from imageserver.client.plan import KIB, MIB, Range, Spans
from imageserver.core.checksums import Recipe

SIZE = 3 * MIB + 77
DATA = bytearray(SIZE)
HELD = Spans([(5, 300 * KIB), (MIB - 9, MIB + 9), (2 * MIB + 100, SIZE - 7)])
for _start, _stop in HELD:
    DATA[_start:_stop] = hashlib.shake_128(b"data").digest(_stop - _start)
BLOCKS = range(0, SIZE, MIB)


def digest(start: int) -> bytes:
    return hashlib.sha256(DATA[start : start + MIB]).digest()


def fed(*ranges: Range) -> list[bytes | None]:
    moved = MovedBlocks(Recipe("sha256", MIB), HELD, SIZE)
    for start, stop in ranges:
        moved.feed(start, DATA[start:stop])
    return [moved.digest(start) for start in BLOCKS]


def test_every_block_that_came_in_order_has_its_digest() -> None:
    cuts = [
        (at, min(at + 70 * KIB, stop))
        for start, stop in HELD
        for at in range(start, stop, 70 * KIB)
    ]
    assert fed(*cuts) == [digest(start) for start in BLOCKS]


def test_nothing_is_known_of_a_block_of_which_some_is_missing_or_came_too_soon() -> None:
    late = [(MIB - 9, MIB + 9), (5, 300 * KIB), (2 * MIB + 100, 2 * MIB + 200)]
    assert fed(*late) == [None, digest(MIB), None, None]


def test_what_is_sent_again_counts_once() -> None:
    again = [(5, 90), (5, 300 * KIB), (50, 300 * KIB), (MIB - 9, MIB + 9), (MIB - 9, MIB + 9)]
    assert fed(*again) == [digest(0), digest(MIB), None, None]


@pytest.mark.parametrize("seed", range(20))
def test_no_order_makes_a_wrong_digest(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - repeatable
    cuts = [
        (at, min(at + 100 * KIB, stop))
        for start, stop in HELD
        for at in range(start, stop, 100 * KIB)
    ]
    some = chance.choices(cuts, k=2 * len(cuts)) + chance.sample(cuts, len(cuts))
    for found, start in zip(fed(*some), BLOCKS, strict=True):
        assert found in {None, digest(start)}


def test_a_digest_that_is_known_already_is_taken_for_a_whole_block_alone() -> None:
    moved = MovedBlocks(Recipe("sha256", MIB), Spans([(0, SIZE)]), SIZE)
    for start, stop, told in (
        (0, MIB, b"0" * 32),
        (MIB, 2 * MIB - 1, b"1" * 32),
        (2 * MIB - 1, 2 * MIB, b"2" * 32),
        (3 * MIB, SIZE, b"3" * 32),
    ):
        moved.note(start, [bytes(DATA[start:stop])], told)
    assert [moved.digest(start) for start in BLOCKS] == [b"0" * 32, digest(MIB), None, b"3" * 32]
