# SPDX-License-Identifier: Apache-2.0
"""From extents to pieces."""

from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.plan import (
    GIB,
    KIB,
    MIB,
    Piece,
    Spans,
    data_spans,
    joined,
    piece_bytes,
    pieces,
)

SIZE = 200
RANGES = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE))).map(
    lambda pairs: joined((min(pair), max(pair)) for pair in pairs)
)


def bytes_of(ranges) -> set[int]:
    return {byte for start, stop in ranges for byte in range(start, stop)}


def test_touching_spans_are_one():
    spans = Spans([(0, 4), (4, 8), (8, 8), (10, 12)])
    assert (list(spans), len(spans), spans.total) == ([(0, 8), (10, 12)], 2, 10)


@given(RANGES, RANGES)
def test_without_takes_away_exactly_what_is_done(spans, done):
    left = Spans(spans).without(done)
    assert bytes_of(left) == bytes_of(spans) - bytes_of(done)
    assert left.total == len(bytes_of(left))


@given(RANGES)
def test_gaps_are_everything_else(spans):
    assert bytes_of(Spans(spans).gaps(SIZE)) == set(range(SIZE)) - bytes_of(spans)


@given(RANGES, st.integers(1, 64))
def test_widened_spans_are_the_blocks_that_hold_any_of_them(spans, block):
    blocks = {byte // block for byte in bytes_of(spans)}
    wide = Spans(spans).widened(block, SIZE)
    assert bytes_of(wide) == {byte for byte in range(SIZE) if byte // block in blocks}
    assert wide.total == len(bytes_of(wide))


@given(RANGES, st.integers(1, 64), st.integers(0, 32))
def test_pieces_hold_each_byte_once_and_cover_what_lies_before(spans, largest, gap):
    cut = list(pieces(Spans(spans), largest, gap))
    assert sorted(byte for piece in cut for byte in bytes_of(piece.spans)) == sorted(
        bytes_of(spans)
    )
    assert all(0 < piece.stop - piece.start <= largest for piece in cut)
    assert [piece.cover for piece in cut] == [0, *(piece.stop for piece in cut)][: len(cut)]
    assert all(piece.cover <= piece.start for piece in cut)


def test_a_small_gap_is_read_and_a_large_one_left_out():
    spans = [(0, KIB), (2 * KIB, 3 * KIB), (2 * MIB, 3 * MIB)]
    assert list(pieces(Spans(spans), GIB)) == [
        Piece(0, 0, 3 * KIB, [(0, KIB), (2 * KIB, 3 * KIB)]),
        Piece(3 * KIB, 2 * MIB, 3 * MIB, [(2 * MIB, 3 * MIB)]),
    ]


def test_wanted_is_what_lies_in_spans():
    piece = Piece(0, 0, 100, [(0, 10), (20, 30), (90, 100)])
    assert list(piece.wanted(5, 25)) == [(5, 10), (20, 25)]
    assert list(piece.wanted(10, 20)) == []
    assert list(piece.wanted(0, 100)) == [(0, 10), (20, 30), (90, 100)]


def test_a_piece_is_done_up_to_its_position():
    piece = Piece(5, 10, 20, [(10, 20)])
    assert piece.done == (5, 5)
    piece.position = 15
    assert piece.done == (5, 15)


def test_data_and_zeros_are_told_apart_and_only_changes_where_asked():
    extents = [(0, 4, False, True), (4, 4, True, True), (8, 4, False, False), (12, 4, True, False)]
    data, zeros, end = data_spans(extents)
    assert (list(data), list(zeros), end) == ([(0, 4), (8, 12)], [(4, 8), (12, 16)], 16)
    data, zeros, end = data_spans(extents, dirty=True)
    assert (list(data), list(zeros), end) == ([(0, 4)], [(4, 8)], 16)


def test_several_connections_get_several_pieces_each():
    assert piece_bytes(100 * GIB, 1) == GIB
    assert piece_bytes(100 * GIB, 4) == 128 * MIB
    assert piece_bytes(GIB, 4) == 64 * MIB
    assert piece_bytes(MIB, 4) == 8 * MIB


def test_joined_ranges_are_ordered_and_apart():
    assert joined([(8, 9), (0, 2), (2, 4), (3, 5), (7, 7)]) == [(0, 5), (8, 9)]
