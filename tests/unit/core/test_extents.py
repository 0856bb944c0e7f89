# SPDX-License-Identifier: Apache-2.0
"""Extents: whatever a server's replies look like, the list covers the image and says the truth."""

from collections.abc import Callable, Iterator
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.core.extents import (
    Extent,
    Merger,
    Piece,
    Reply,
    allocation_pieces,
    dirty_context,
    union_pieces,
)

DATA, HOLE, ZERO = 0, 1, 2


def test_the_dirty_context_is_qemus() -> None:
    assert dirty_context("b0") == "qemu:dirty-bitmap:b0"


@pytest.mark.parametrize(
    ("lengths", "flags", "limit", "pieces"),
    [
        pytest.param([4, 6], [DATA, HOLE], 10, [(4, DATA, 0), (6, HOLE, 0)], id="exact"),
        pytest.param([4], [DATA], 10, [(4, DATA, 0)], id="short"),
        pytest.param([4, 60], [DATA, HOLE], 10, [(4, DATA, 0), (6, HOLE, 0)], id="long"),
        pytest.param([10, 5], [DATA, HOLE], 10, [(10, DATA, 0)], id="one-too-many"),
        pytest.param([1, 1, 1], [0, 0, 3], 3, [(1, 0, 0), (1, 0, 0), (1, 3, 0)], id="one-byte"),
        pytest.param([2**40], [ZERO], 2**50, [(2**40, ZERO, 0)], id="1-tib"),
        pytest.param([], [], 10, [], id="nothing"),
    ],
)
def test_allocation_is_cut_at_the_limit(
    lengths: list[int], flags: list[int], limit: int, pieces: list[Piece]
) -> None:
    assert list(allocation_pieces(Reply(lengths, flags), limit)) == pieces


def test_allocation_without_a_bitmap_carries_the_dirty_flags_it_is_given() -> None:
    assert list(allocation_pieces(Reply([4, 60], [DATA, HOLE]), 10, 1)) == [(4, 0, 1), (6, 1, 1)]


@pytest.mark.parametrize(
    ("allocation", "dirty", "limit", "pieces"),
    [
        pytest.param(
            Reply([7, 12, 14], [DATA, HOLE, DATA]),
            Reply([7, 12], [0, 1]),
            32,
            [(7, DATA, 0), (12, HOLE, 1)],
            id="as-drawn",
        ),
        pytest.param(
            Reply([6, 4], [DATA, HOLE]),
            Reply([3, 7], [0, 1]),
            10,
            [(3, DATA, 0), (3, DATA, 1), (4, HOLE, 1)],
            id="boundaries-of-both",
        ),
        pytest.param(
            Reply([3], [HOLE]), Reply([10], [1]), 10, [(3, HOLE, 1)], id="allocation-ends-first"
        ),
        pytest.param(
            Reply([10], [HOLE]), Reply([3], [1]), 10, [(3, HOLE, 1)], id="bitmap-ends-first"
        ),
        pytest.param(
            Reply([100], [DATA]),
            Reply([4, 96], [1, 0]),
            10,
            [(4, DATA, 1), (6, DATA, 0)],
            id="both-beyond-the-limit",
        ),
        pytest.param(
            Reply([10, 90], [DATA, HOLE]),
            Reply([10, 90], [0, 1]),
            10,
            [(10, DATA, 0)],
            id="limit-on-a-boundary",
        ),
        pytest.param(
            Reply([1, 1], [DATA, HOLE]),
            Reply([2], [1]),
            2,
            [(1, DATA, 1), (1, HOLE, 1)],
            id="one-byte",
        ),
        pytest.param(Reply([], []), Reply([5], [1]), 5, [], id="no-allocation"),
        pytest.param(Reply([5], [0]), Reply([], []), 5, [], id="no-bitmap"),
    ],
)
def test_a_union_has_the_boundaries_of_both_up_to_the_nearest_end(
    allocation: Reply, dirty: Reply, limit: int, pieces: list[Piece]
) -> None:
    assert list(union_pieces(allocation, dirty, limit)) == pieces


_MISMATCH = Reply([5, 5], [1])


@pytest.mark.parametrize(
    "walk",
    [
        pytest.param(lambda: allocation_pieces(_MISMATCH, 10), id="allocation"),
        pytest.param(lambda: union_pieces(_MISMATCH, Reply([10], [0]), 10), id="union-allocation"),
        pytest.param(
            lambda: union_pieces(Reply([10], [0]), _MISMATCH, 10),
            id="union-dirty",
        ),
    ],
)
def test_a_length_without_flags_is_an_error_and_no_guess(
    walk: Callable[[], Iterator[Piece]],
) -> None:
    with pytest.raises(ValueError, match="shorter"):
        list(walk())


def _merge(*steps: list[Piece]) -> list[Extent]:
    merger = Merger()
    return [e for pieces in steps for e in merger.add(pieces)] + list(merger.finish())


@pytest.mark.parametrize(
    ("steps", "extents"),
    [
        pytest.param([], [], id="no-step"),
        pytest.param([[]], [], id="empty-step"),
        pytest.param([[(5, DATA, 0)]], [(0, 5, False, False)], id="data"),
        pytest.param([[(5, HOLE, 0)]], [(0, 5, True, False)], id="hole"),
        pytest.param([[(5, ZERO, 0)]], [(0, 5, True, False)], id="zero-cluster"),
        pytest.param([[(5, DATA, 1)]], [(0, 5, False, True)], id="dirty"),
        pytest.param(
            [[(1, HOLE, 0), (1, ZERO, 0), (1, HOLE | ZERO, 0)]],
            [(0, 3, True, False)],
            id="hole-and-zero-agree",
        ),
        pytest.param(
            [[(1, 0b1100, 0b110), (1, DATA, 0)]], [(0, 2, False, False)], id="unknown-flags-agree"
        ),
        pytest.param(
            [[(5, DATA, 0), (5, DATA, 1), (5, HOLE, 1)]],
            [(0, 5, False, False), (5, 5, False, True), (10, 5, True, True)],
            id="either-flag-splits",
        ),
        pytest.param(
            [[(5, HOLE, 0)], [(5, ZERO, 0)], [(5, DATA, 0)]],
            [(0, 10, True, False), (10, 5, False, False)],
            id="joined-across-steps",
        ),
        pytest.param(
            [[(1 << 62, HOLE, 0), (1 << 62, HOLE, 0)]], [(0, 1 << 63, True, False)], id="huge"
        ),
        pytest.param(
            [[(5, DATA, 0), (0, HOLE, 0), (5, DATA, 0)]],
            [(0, 10, False, False)],
            id="empty-piece",
        ),
    ],
)
def test_neighbours_that_agree_are_one_extent(
    steps: list[list[Piece]], extents: list[Extent]
) -> None:
    assert _merge(*steps) == extents


def test_an_extent_is_given_out_as_soon_as_the_next_one_begins() -> None:
    merger = Merger()

    assert list(merger.add([(5, DATA, 0), (5, HOLE, 0)])) == [(0, 5, False, False)]


def test_the_position_counts_the_extent_that_is_still_open() -> None:
    merger = Merger()
    list(merger.add([(5, DATA, 0), (7, HOLE, 0)]))

    assert merger.position == 12


def test_finishing_twice_gives_the_last_extent_once() -> None:
    merger = Merger(100)
    list(merger.add([(5, DATA, 0)]))

    assert [list(merger.finish()), list(merger.finish())] == [[(100, 5, False, False)], []]
    assert merger.position == 105


def test_merging_pulls_one_piece_at_a_time() -> None:
    pulled = []

    def pieces() -> Iterator[Piece]:
        for number in range(1000):
            pulled.append(number)
            yield 1, number & 1, 0

    next(Merger().add(pieces()))

    assert len(pulled) == 2


STYLES = ("exact", "short", "long", "one-extent", "one-byte", "past-the-end")
#: How a simulated server words a reply: one of STYLES, and how far to cut or to overshoot.
Wording = tuple[str, int]


def _answer(flags: list[int], offset: int, length: int, wording: Wording) -> Reply:
    """Answer as an NBD server may: at least one extent, and the last may exceed the request."""
    style, cut = wording
    stop = offset + length
    if style in {"short", "one-byte"}:
        stop = offset + 1 + cut % length
    elif style in {"long", "past-the-end"}:
        # The last extent in full, wherever that ends.
        while stop < len(flags) and flags[stop] == flags[stop - 1]:
            stop += 1
    asked = flags[offset:stop]
    if style == "one-byte":
        return Reply([1] * len(asked), asked)
    runs = [(flag, len(list(group))) for flag, group in groupby(asked)]
    if style == "one-extent":
        del runs[1:]
    lengths, states = [n for _, n in runs], [f for f, _ in runs]
    if style == "past-the-end" and stop == len(flags):
        lengths[-1] += cut
    return Reply(lengths, states)


def _runs(max_flag: int) -> st.SearchStrategy[list[int]]:
    run = st.tuples(st.integers(1, 8), st.integers(0, max_flag))
    return st.lists(run, max_size=12).map(lambda runs: [flag for n, flag in runs for _ in range(n)])


@st.composite
def _images(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    allocation, dirty = draw(_runs(7)), draw(_runs(3))
    size = min(len(allocation), len(dirty))
    return allocation[:size], dirty[:size]


_STEPS = st.integers(1, 12) | st.integers(1, 100)
_WORDINGS = st.lists(st.tuples(st.sampled_from(STYLES), st.integers(0, 9)), min_size=1, max_size=4)


def _list_extents(
    size: int, step: int, answer: Callable[[int, int, int, int], Iterator[Piece]], *, wide: bool
) -> list[Extent]:
    """Ask from ``merger.position`` on until the image is covered, as the NBD back end does.

    ``wide``: replies beyond the request are used up to the image's end, else cut at the request.
    """
    merger = Merger()
    extents: list[Extent] = []
    for number in range(size + 1):
        before = merger.position
        if before == size:
            break
        length = min(step, size - before)
        limit = size - before if wide else length
        extents += merger.add(answer(number, before, length, limit))
        assert before < merger.position <= before + limit, "no progress, or too much"
    return extents + list(merger.finish())


def _per_byte(extents: list[Extent]) -> list[tuple[bool, bool]]:
    """Spell extents out, insisting on order, no gap, no empty extent and unequal neighbours."""
    at = 0
    for start, length, _, _ in extents:
        assert (start, length > 0) == (at, True)
        at += length
    assert all(a[2:] != b[2:] for a, b in pairwise(extents))
    return [(zero, dirty) for _, length, zero, dirty in extents for _ in range(length)]


@settings(max_examples=200, deadline=None)
@given(_images(), _STEPS, _WORDINGS, st.booleans(), st.integers(0, 1))
def test_allocation_of_any_image_by_any_server_is_true_for_every_byte(
    image: tuple[list[int], list[int]], step: int, wordings: list[Wording], wide: bool, bits: int
) -> None:
    flags = image[0]

    def answer(number: int, offset: int, length: int, limit: int) -> Iterator[Piece]:
        reply = _answer(flags, offset, length, wordings[number % len(wordings)])
        return allocation_pieces(reply, limit, bits)

    extents = _list_extents(len(flags), step, answer, wide=wide)

    assert _per_byte(extents) == [(f & 3 != 0, bool(bits)) for f in flags]


@settings(max_examples=200, deadline=None)
@given(_images(), _STEPS, _WORDINGS, _WORDINGS, st.booleans())
def test_the_union_of_any_two_contexts_is_true_for_every_byte(
    image: tuple[list[int], list[int]],
    step: int,
    wordings: list[Wording],
    dirty_wordings: list[Wording],
    wide: bool,
) -> None:
    flags, bits = image

    def answer(number: int, offset: int, length: int, limit: int) -> Iterator[Piece]:
        allocation = _answer(flags, offset, length, wordings[number % len(wordings)])
        dirty = _answer(bits, offset, length, dirty_wordings[number % len(dirty_wordings)])
        return union_pieces(allocation, dirty, limit)

    extents = _list_extents(len(flags), step, answer, wide=wide)

    assert _per_byte(extents) == [
        (f & 3 != 0, b & 1 != 0) for f, b in zip(flags, bits, strict=True)
    ]


@settings(max_examples=200, deadline=None)
@given(_images(), _STEPS, _WORDINGS, _WORDINGS, st.booleans())
def test_holes_of_any_image_are_true_for_every_byte(
    image: tuple[list[int], list[int]],
    step: int,
    wordings: list[Wording],
    depth_wordings: list[Wording],
    wide: bool,
) -> None:
    flags, depths = image

    def answer(number: int, offset: int, length: int, limit: int) -> Iterator[Piece]:
        allocation = _answer(flags, offset, length, wordings[number % len(wordings)])
        depth = _answer(depths, offset, length, depth_wordings[number % len(depth_wordings)])
        return union_pieces(allocation, depth.holes(), limit)

    extents = _list_extents(len(flags), step, answer, wide=wide)

    assert _per_byte(extents) == [
        (f & 3 != 0, depth == 0) for f, depth in zip(flags, depths, strict=True)
    ]


def test_an_empty_image_has_no_extent_and_is_never_asked_about() -> None:
    def answer(number: int, offset: int, length: int, limit: int) -> Iterator[Piece]:
        raise AssertionError((number, offset, length, limit))

    assert _list_extents(0, 100, answer, wide=True) == []
