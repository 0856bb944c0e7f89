# SPDX-License-Identifier: Apache-2.0
"""Block status over a fake link: replies of any length are extents without gaps, or an error."""

from collections.abc import Callable
from itertools import chain

import pytest

from imageserver.backends.nbd import status
from imageserver.core.errors import BackendError
from imageserver.core.extents import ALLOCATION, DEPTH, Extent, Reply, dirty_context
from tests.unit.backends.links import FakeLink

SIZE = 64 * 1024
DIRTY = dirty_context("bitmap")
HOLE, ZERO = 1, 2


def _list(fake: FakeLink, start: int = 0, stop: int = SIZE, *, dirty: bool = False) -> list[Extent]:
    found = status.list_extents(fake.link, "bitmap", start, stop, dirty=dirty)
    return list(chain.from_iterable(found))


def _fake(
    lengths: Callable[[int, int], list[tuple[int, int]]],
    contexts: tuple[str, ...] = (ALLOCATION,),
    align: int = 1,
) -> FakeLink:
    """Return a link whose status is (length, flags) pairs from an offset and a length."""

    def reply(offset: int, length: int) -> dict[str, Reply]:
        pairs = lengths(offset, length)
        one = Reply([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        return dict.fromkeys(contexts, one)

    return FakeLink(bytearray(), size=SIZE, align=align, contexts=contexts, status=reply)


def _parity(offset: int, length: int, step: int = 4096) -> list[tuple[int, int]]:
    """Describe an export of which every other 4 KiB are a hole."""
    pieces = range(offset // step, -(-(offset + length) // step))
    return [
        (min((n + 1) * step, offset + length) - max(n * step, offset), ZERO * (n % 2))
        for n in pieces
    ]


EXPECTED = [(n * 4096, 4096, n % 2 == 1, False) for n in range(16)]


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(_parity, id="all"),
        pytest.param(lambda at, _length: [(64, ZERO * (at // 4096 % 2))], id="a-bit-at-a-time"),
        pytest.param(lambda at, length: _parity(at, min(length, 5000)), id="short"),
        pytest.param(lambda at, length: _parity(at, length + 9000), id="beyond-the-end"),
    ],
)
def test_replies_of_any_length_are_the_same_extents(
    lengths: Callable[[int, int], list[tuple[int, int]]],
) -> None:
    assert _list(_fake(lengths)) == EXPECTED


@pytest.mark.parametrize("kind", [0, HOLE, ZERO, HOLE | ZERO])
@pytest.mark.parametrize("dirty", [False, True], ids=["zero", "dirty"])
def test_short_replies_that_agree_are_one_extent(kind: int, dirty: bool) -> None:
    fake = _fake(lambda _at, _length: [(1000, kind)])

    # Without a bitmap all is dirty.
    assert _list(fake, dirty=dirty) == [(0, SIZE, bool(kind), dirty)]


@pytest.mark.parametrize("span", [(5, 105), (4091, 4101), (8192, 8193), (4095, 9000)], ids=str)
def test_status_is_asked_for_in_whole_blocks_and_cut(span: tuple[int, int]) -> None:
    fake = _fake(_parity, align=4096)  # the fake refuses other requests

    found = _list(fake, *span)

    assert (found[0][0], sum(extent[1] for extent in found)) == (span[0], span[1] - span[0])
    assert all(extent[2] == (extent[0] // 4096 % 2 == 1) for extent in found)


def test_a_reply_that_ends_inside_a_block_is_taken_up_from_the_blocks_beginning() -> None:
    replies = iter([[(5000, 1)], [(1000, 1), (SIZE - 5096, 0)]])
    fake = _fake(lambda _at, _length: next(replies), align=4096)

    assert _list(fake) == [(0, 5096, True, False), (5096, SIZE - 5096, False, False)]
    assert fake.sent("status") == [(0, SIZE), (4096, SIZE - 4096)]


def test_no_request_is_longer_than_32_bits_hold() -> None:
    fake = _fake(lambda _at, length: [(length, 0)])
    fake.size = 10 << 30

    assert _list(fake, 0, fake.size) == [(0, fake.size, False, False)]
    lengths = [length for _, length in fake.sent("status")]
    assert (max(lengths), len(lengths)) == ((1 << 32) - (1 << 16), 3)


def test_where_the_server_tells_nothing_all_is_data_and_nothing_is_asked() -> None:
    fake = _fake(_parity, contexts=())

    assert _list(fake) == [(0, SIZE, False, False)]
    assert _list(fake, dirty=True) == [(0, SIZE, False, True)]
    assert fake.requests == []


def test_dirt_comes_from_the_bitmap_where_the_server_has_it() -> None:
    fake = _fake(lambda _at, _length: [], contexts=(ALLOCATION, DIRTY))
    fake.status = lambda _at, length: {
        ALLOCATION: Reply([length], [0]),
        DIRTY: Reply([4096, length - 4096], [1, 0]),
    }

    assert _list(fake, dirty=True) == [(0, 4096, False, True), (4096, SIZE - 4096, False, False)]


def test_holes_are_where_nothing_is_allocated_in_the_chain() -> None:
    fake = _fake(lambda _at, _length: [], contexts=(ALLOCATION, DEPTH, DIRTY))
    fake.status = lambda at, _length: {
        ALLOCATION: Reply([8192, SIZE - 8192], [HOLE | ZERO, 0]),
        DEPTH: Reply([4096, 8192, SIZE], [0, 1, 2]) if at == 0 else Reply([SIZE], [1]),
        DIRTY: Reply([100], [1]),
    }

    assert _list(fake) == [
        (0, 4096, True, True),
        (4096, 4096, True, False),
        (8192, SIZE - 8192, False, False),
    ]
    assert len(fake.sent("status")) == 1  # the bitmap's answer, which ends early, is not used


def test_holes_of_a_span_are_cut_where_its_zeros_are() -> None:
    fake = _fake(lambda _at, _length: [], contexts=(ALLOCATION, DEPTH), align=4096)
    fake.status = lambda at, length: {
        ALLOCATION: Reply([length], [ZERO]),
        DEPTH: Reply([5000 - at, length], [0, 3]) if at < 5000 else Reply([length], [3]),
    }

    assert _list(fake, 4500, 6000) == [(4500, 500, True, True), (5000, 1000, True, False)]


def test_dirty_extents_do_not_look_at_the_depth() -> None:
    fake = _fake(lambda _at, length: [(length, 0)], contexts=(ALLOCATION, DEPTH))

    assert _list(fake, dirty=True) == [(0, SIZE, False, True)]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        pytest.param({}, "left out the status of 'base:allocation'", id="no-context"),
        pytest.param({ALLOCATION: Reply([0], [0])}, "makes no progress", id="length-0"),
        pytest.param({ALLOCATION: Reply([0, 0], [0, 1])}, "makes no progress", id="lengths-0"),
        pytest.param({ALLOCATION: Reply([], [])}, "makes no progress", id="nothing"),
    ],
)
def test_a_reply_without_sense_is_an_error_not_a_loop(
    reply: dict[str, Reply], message: str
) -> None:
    fake = FakeLink(
        bytearray(), size=SIZE, contexts=(ALLOCATION,), status=lambda _at, _length: reply
    )
    with pytest.raises(BackendError, match=message):
        _list(fake)


def test_a_status_that_fails_later_ends_after_what_came_before() -> None:
    fake = _fake(lambda at, length: _parity(at, min(length, 4096)))
    fake.fail = lambda request: BackendError("as told") if request.start >= 8192 else None
    got: list[Extent] = []

    listed = status.list_extents(fake.link, "bitmap", 0, SIZE, dirty=False)
    with pytest.raises(BackendError, match="as told"):
        got.extend(chain.from_iterable(listed))

    assert got == EXPECTED[:1]  # the second may go on
