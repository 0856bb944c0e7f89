# SPDX-License-Identifier: Apache-2.0
"""The picture of an image: cells that add up to its extents, whatever their number."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.showing.map_cells import (
    ASCII,
    BLOCKS,
    Canvas,
    Cell,
    Kind,
    rows_for,
    rows_of,
)

#: (length, zero, dirty) of neighbours.
PIECES = st.lists(st.tuples(st.integers(1, 1 << 40), st.booleans(), st.booleans()), max_size=40)


def painted(pieces: list[tuple[int, bool, bool]], cells: int) -> Canvas:
    canvas = Canvas(sum(length for length, _, _ in pieces), cells)
    start = 0
    for length, zero, dirty in pieces:
        canvas.add(start, length, zero=zero, dirty=dirty)
        start += length
    return canvas


@given(PIECES, st.integers(1, 300))
def test_cells_add_up_to_the_extents(pieces: list[tuple[int, bool, bool]], count: int) -> None:
    canvas = painted(pieces, count)
    wanted = [0, 0, 0, 0]
    for length, zero, dirty in pieces:
        wanted[zero + 2 * dirty] += length
    assert list(canvas.totals()) == wanted
    assert canvas.extents == len(pieces)


@given(PIECES, st.integers(1, 300))
def test_cells_cover_the_image_in_order_and_are_full(
    pieces: list[tuple[int, bool, bool]], count: int
) -> None:
    canvas = painted(pieces, count)
    cells = list(canvas.cells())
    assert len(cells) == len(canvas) == min(count, canvas.size)
    bounds = [cell.start for cell in cells] + [canvas.size]
    assert bounds == [0] * (not cells) + [0] * bool(cells) + [cell.stop for cell in cells]
    assert all(sum(cell.sums) == cell.stop - cell.start for cell in cells)
    lengths = {cell.stop - cell.start for cell in cells}
    assert not lengths or max(lengths) - min(lengths) <= 1


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans())), st.integers(1, 50))
def test_each_byte_is_in_its_cell(pieces: list[tuple[int, bool, bool]], count: int) -> None:
    image = [zero + 2 * dirty for length, zero, dirty in pieces for _ in range(length)]
    for cell in painted(pieces, count).cells():
        kinds = image[cell.start : cell.stop]
        assert cell.sums == tuple(kinds.count(kind) for kind in Kind)


def test_an_empty_image_has_no_cells() -> None:
    canvas = painted([], 80)
    assert (list(canvas.cells()), canvas.totals(), len(canvas)) == ([], (0, 0, 0, 0), 0)


@pytest.mark.parametrize(
    ("sums", "blocks", "ascii_"),
    [
        pytest.param((100, 0, 0, 0), "█", "#", id="data"),
        pytest.param((0, 100, 0, 0), "·", ".", id="zero"),
        pytest.param((0, 0, 100, 0), "■", "@", id="dirty"),
        pytest.param((0, 0, 0, 100), "○", "0", id="dirty-zero"),
        pytest.param((1, 99, 0, 0), "░", "-", id="hardly-any-data-is-seen"),
        pytest.param((50, 50, 0, 0), "▒", "=", id="half"),
        pytest.param((99, 1, 0, 0), "▓", "+", id="nearly-all-is-not-all"),
        pytest.param((99, 0, 1, 0), "▘", "i", id="any-dirt-is-seen"),
        pytest.param((40, 0, 60, 0), "▚", "x", id="half-dirty"),
        pytest.param((1, 0, 99, 0), "▙", "X", id="nearly-all-dirty"),
        pytest.param((1, 0, 0, 99), "░", "-", id="data-before-dirty-zeros"),
        pytest.param((0, 99, 0, 1), "○", "0", id="dirty-zeros-before-zeros"),
    ],
)
def test_a_cell_shows_what_matters_most(sums: tuple[int, ...], blocks: str, ascii_: str) -> None:
    cell = Cell(0, 100, sums)
    assert (BLOCKS.of(cell), ASCII.of(cell)) == (blocks, ascii_)


@pytest.mark.parametrize("glyphs", [BLOCKS, ASCII], ids=["blocks", "ascii"])
def test_kinds_differ_without_colours(glyphs: object) -> None:
    families = [set(levels) for levels in glyphs.levels]
    assert sum(map(len, families)) == len(set.union(*families)) == 10
    assert "".join(ASCII.levels).isascii()


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        (0, 1),
        (64 << 10, 1),
        (64 * 80 << 10, 1),
        ((64 * 80 << 10) + 1, 2),
        (32 << 20, 4),
        (1 << 50, 16),
    ],
)
def test_rows_grow_with_the_image_by_powers_of_two_up_to_a_limit(size: int, rows: int) -> None:
    assert rows_for(size, 80, 16) == rows


def test_the_last_row_may_be_shorter() -> None:
    rows = rows_of(painted([(10, True, False)], 10).cells(), 4)
    assert [[cell.start for cell in row] for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
