# SPDX-License-Identifier: Apache-2.0
"""flock(2) with a deadline."""

import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.runtime import flock
from imageserver.runtime.flock import steps, try_flock, wait_flock


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Return two open file descriptions of one file."""
    fds = [os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600) for _ in range(2)]
    yield fds[0], fds[1]
    for fd in fds:
        os.close(fd)


def test_a_lock_has_one_holder(pair: tuple[int, int]) -> None:
    one, two = pair

    assert [try_flock(one), try_flock(two), wait_flock(two, 0.002)] == [True, False, False]


def test_a_shared_lock_has_several(pair: tuple[int, int]) -> None:
    one, two = pair

    assert try_flock(one, fcntl.LOCK_SH)
    assert wait_flock(two, 0, fcntl.LOCK_SH)
    assert not try_flock(two)


@pytest.mark.parametrize("operation", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_lock_that_becomes_free_in_time_is_taken_as_was_asked(
    pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch, operation: int
) -> None:
    one, two = pair
    assert try_flock(one)
    clock = SimpleNamespace(
        monotonic=lambda: 1000.0, sleep=lambda _: fcntl.flock(one, fcntl.LOCK_UN)
    )
    monkeypatch.setattr(flock, "time", clock)

    assert wait_flock(two, 30, operation)
    assert try_flock(one, fcntl.LOCK_SH) is (operation == fcntl.LOCK_SH)


def test_who_has_no_time_tries_once(pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = pair
    assert try_flock(one)
    clock = SimpleNamespace(monotonic=lambda: 1000.0, sleep=lambda _: pytest.fail("it has waited"))
    monkeypatch.setattr(flock, "time", clock)

    assert not wait_flock(two, 0)


def test_a_lock_that_is_held_for_microseconds_is_tried_again_soon_and_others_at_leisure() -> None:
    waits = list(itertools.islice(steps(0.001), 50))

    assert waits[0] <= 0.0001
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(waits))
    assert waits[-1] == 0.001
