# SPDX-License-Identifier: Apache-2.0
"""Checksums: blocks of extents, and what each adds."""

import hashlib
from collections.abc import Generator

import pytest

from imageserver.core import checksums
from imageserver.core.checksums import ALGORITHMS, Block, Recipe, Splitter
from imageserver.core.errors import BadRequest
from imageserver.core.extents import Extent

KIB, MIB = 1 << 10, 1 << 20


def _blocks(batches: list[list[Extent]], start: int = 0) -> list[Block]:
    splitter = Splitter(start, MIB)
    found = [block for batch in batches for block in splitter.add(batch)]
    return found + list(splitter.finish())


def test_neighbours_share_a_block_across_batches() -> None:
    batches: list[list[Extent]] = [
        [(0, 100 * KIB, False, False)],
        [],
        [(100 * KIB, 400 * KIB, True, False), (500 * KIB, MIB, False, False)],
    ]

    assert _blocks(batches) == [
        Block(0, MIB, ((0, 100 * KIB), (500 * KIB, MIB))),
        Block(MIB, 500 * KIB, ((MIB, MIB + 500 * KIB),)),
    ]


def test_holes_of_a_cluster_are_left_out_and_smaller_ones_are_read_along() -> None:
    extents: list[Extent] = [
        (0, 4 * KIB, False, False),
        (4 * KIB, 60 * KIB, True, False),
        (64 * KIB, 64 * KIB, False, False),
        (128 * KIB, 64 * KIB, True, False),
        (192 * KIB, KIB, False, False),
    ]

    (block,) = _blocks([extents])
    assert block.data == ((0, 128 * KIB), (192 * KIB, 193 * KIB))


def test_a_long_hole_is_a_few_entries_that_begin_where_the_span_does() -> None:
    blocks = _blocks([[(5, 3000 * MIB + 7, True, False)]], start=5)

    assert [(block.start - 5, block.length) for block in blocks] == [
        (0, 1024 * MIB),
        (1024 * MIB, 1024 * MIB),
        (2048 * MIB, 952 * MIB),
        (3000 * MIB, 7),
    ]
    assert not any(block.data for block in blocks)


@pytest.mark.parametrize(
    ("algorithm", "most"), [("whole-sha256", 64 * MIB), ("blake2b", 4096 * MIB)]
)
def test_what_hashes_a_hole_byte_by_byte_takes_less_of_it_at_once(
    algorithm: str, most: int
) -> None:
    blocks = Recipe(algorithm, None).splitter(5).add([(5, 8192 * MIB, True, False)])
    assert {block.length for block in blocks} == {most}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_holes_and_data_add_up_to_the_digest_of_the_bytes(algorithm: str) -> None:
    data = bytearray(bytes(range(1, 252)) * (3 * MIB // 251 + 1))
    holes = [(300 * KIB, 600 * KIB), (MIB, 2 * MIB), (3 * MIB, 3 * MIB + 3)]
    extents: list[Extent] = []
    at = 0
    for start, stop in holes:
        data[start:stop] = bytes(stop - start)
        extents += [(at, start - at, False, False), (start, stop - start, True, False)]
        at = stop
    extents.append((at, len(data) - at, False, False))
    recipe = Recipe(algorithm, None if algorithm.startswith("whole-") else MIB)

    def read(start: int, length: int) -> Generator[memoryview]:
        yield memoryview(data)[start : start + length]

    splitter = recipe.splitter(0)
    for block in [*splitter.add(extents), *splitter.finish()]:
        if block.data:
            recipe.add(recipe.part(block, read))
        else:
            recipe.add_zeros(block.length)
    assert recipe.answer()["checksum"] == _expected(algorithm, bytes(data))


def _expected(algorithm: str, data: bytes) -> str:
    name = algorithm.removeprefix("whole-")
    if name != algorithm:
        return hashlib.new(name, data).hexdigest()
    more = {"digest_size": 32} if name.startswith("blake2") else {}
    new = getattr(hashlib, name)
    parts = [new(data[at : at + MIB], **more).digest() for at in range(0, len(data), MIB)]
    digest: str = new(b"".join(parts), **more).hexdigest()
    return digest


@pytest.mark.parametrize(
    ("algorithm", "size", "message"),
    [
        ("crc32", None, "unsupported algorithm; supported are blake2b, "),
        ("shake_128", None, "unsupported algorithm; "),
        ("whole-sha256", 4 << 20, '"block_size" is for block hashes; whole checksums have none'),
        ("blake2b", 4097 * 512, 'invalid "block_size": it must be a multiple of 4096 from '),
        ("blake2b", (1 << 20) - 4096, 'invalid "block_size": '),
        ("blake2b", (16 << 20) + 4096, "from 1048576 to 16777216"),
    ],
)
def test_what_cannot_be_computed_is_refused(algorithm: str, size: int | None, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        Recipe(algorithm, size)


def test_what_has_no_hole_costs_no_hash_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(_algorithm: str, _length: int) -> bytes:
        raise AssertionError

    monkeypatch.setattr(checksums, "_zero_part", hashed)
    recipe = Recipe("sha256", None)
    recipe.add(hashlib.sha256(b"data").digest())
    wanted = hashlib.sha256(hashlib.sha256(b"data").digest()).hexdigest()
    assert recipe.answer()["checksum"] == wanted
