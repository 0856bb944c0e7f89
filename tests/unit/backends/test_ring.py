# SPDX-License-Identifier: Apache-2.0
"""The ring of buffers between two threads, and what it leaves to the next one."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from imageserver.backends import ring as rings
from imageserver.backends.ring import Ring, Side
from imageserver.core.errors import Exhausted
from tests.unit.shortages import no_descriptors, no_threads

SIZE = 4096


@pytest.fixture(autouse=True)
def _nothing_spare() -> Iterator[None]:
    rings._spare.clear()
    yield
    rings._spare.clear()


def _used(owner: str, size: int = SIZE) -> bytearray:
    """Return a buffer that a transfer of ``owner`` has filled, and left."""
    with Ring(1, size, owner) as ring:
        buffer = ring.take(wait=True)
        assert buffer is not None
        buffer[:] = b"x" * size
        ring.give(buffer)
    return buffer


def test_a_closed_ring_makes_nobody_wait_however_often_one_asks():
    with Ring(1, SIZE, "image") as ring, ThreadPoolExecutor(1) as pool:
        assert ring.take(wait=True) is not None
        ring.close()
        asked = pool.submit(lambda: [ring.take(wait=wait) for wait in (False, True, True)])
        try:
            assert asked.result(timeout=5) == [None, None, None]
        finally:
            ring.give(bytearray(SIZE))  # or a failing test would never end
            ring.give(bytearray(SIZE))


def test_a_ring_that_is_closed_before_it_made_a_buffer_makes_none():
    with Ring(2, SIZE, "image") as ring:
        ring.close()
        assert ring.take(wait=True) is None


def test_no_more_buffers_are_made_than_a_ring_may_have():
    with Ring(2, SIZE, "image") as ring:
        assert [len(ring.take(wait=False) or b"") for _ in range(3)] == [SIZE, SIZE, 0]


def test_a_buffer_is_used_again_for_the_same_image():
    buffer = _used("image")
    with Ring(1, SIZE, "image") as ring:
        assert ring.take(wait=True) is buffer


def test_nothing_of_one_image_is_left_for_another():
    buffer = _used("image")
    with Ring(1, SIZE, "another") as ring:
        assert ring.take(wait=True) is buffer
        assert buffer == bytes(SIZE)


def test_a_buffer_that_may_still_be_written_to_is_not_used_again():
    with Ring(1, SIZE, "image") as ring:
        in_flight = ring.take(wait=True)
    with Ring(1, SIZE, "image") as ring:
        assert ring.take(wait=True) is not in_flight


def test_a_buffer_of_another_size_is_not_used():
    _used("image", SIZE)
    with Ring(1, 2 * SIZE, "image") as ring:
        assert len(ring.take(wait=True) or b"") == 2 * SIZE


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rings, "_SPARE_BYTES", 3 * SIZE)
    with Ring(8, SIZE, "image") as ring:
        for buffer in [ring.take(wait=False) for _ in range(8)]:
            assert buffer is not None
            ring.give(buffer)
    assert len(rings._spare) == 3


def test_an_images_side_that_finds_no_thread_says_so_and_does_nothing():
    done: list[str] = []
    side = Side(lambda: done.append("work"), lambda: done.append("ended"), nullcontext)
    with no_threads(), pytest.raises(Exhausted), side:
        done.append("body")
    assert done == []


def test_a_ring_that_finds_no_descriptor_says_so_and_ends_as_ever():
    with Ring(1, SIZE, "image") as ring, no_descriptors():
        with pytest.raises(Exhausted):
            ring.fileno()
        ring.close()
