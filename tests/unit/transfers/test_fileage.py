# SPDX-License-Identifier: Apache-2.0
"""How old files are while the system's clock is set forward and back."""

import pytest

from imageserver.transfers.fileage import FileAge

SECOND = 1_000_000_000
HOUR = 3600 * SECOND


class _Clocks:
    """The monotonic clock, and the system's, which may be set."""

    def __init__(self) -> None:
        self.now = 500 * SECOND
        self.ahead = 1_700_000_000 * SECOND

    def wall(self) -> int:
        return self.now + self.ahead

    def monotonic(self) -> int:
        return self.now


@pytest.fixture
def clocks() -> _Clocks:
    return _Clocks()


@pytest.fixture
def ages(clocks: _Clocks) -> FileAge:
    return FileAge(clocks.wall, clocks.monotonic)


@pytest.mark.parametrize("age", [0, 1, 500, 10**6])
def test_an_age_is_what_the_clocks_say(clocks: _Clocks, ages: FileAge, age: int) -> None:
    assert ages.age_ns(clocks.wall() - age * SECOND) == age * SECOND


@pytest.mark.parametrize("hours", [-100, -1, 1, 100])
def test_a_file_ages_as_before_whatever_the_clock_is_set_to(
    clocks: _Clocks, ages: FileAge, hours: int
) -> None:
    old = clocks.wall() - 3 * SECOND
    clocks.now += 10 * SECOND
    changed = clocks.wall()
    clocks.now += 20 * SECOND
    clocks.ahead += hours * HOUR

    found = [ages.age_ns(stamp) for stamp in (old, changed, clocks.wall())]
    clocks.now += 5 * SECOND

    assert found == [33 * SECOND, 20 * SECOND, 0]
    assert ages.age_ns(changed) == 25 * SECOND


def test_a_file_of_a_time_to_come_is_new(clocks: _Clocks, ages: FileAge) -> None:
    assert ages.age_ns(clocks.wall() + HOUR) == 0


def test_where_a_stamp_may_be_of_two_moments_the_later_one_counts(
    clocks: _Clocks, ages: FileAge
) -> None:
    changed = clocks.wall()
    clocks.now += SECOND
    ages.age_ns(changed)
    clocks.ahead -= HOUR
    assert ages.age_ns(changed) == SECOND
    clocks.now += HOUR + 60 * SECOND

    assert ages.age_ns(changed) == 61 * SECOND
    clocks.now += HOUR
    assert ages.age_ns(changed) == HOUR + 61 * SECOND  # nothing lives for ever


def test_a_clock_that_is_set_all_the_time_is_followed(clocks: _Clocks, ages: FileAge) -> None:
    for _ in range(500):
        clocks.now += SECOND
        clocks.ahead += 60 * SECOND
        assert ages.age_ns(clocks.wall() - SECOND // 100) <= SECOND
    assert len(ages._periods) < 50


def test_a_file_ages_as_before_where_the_clock_was_only_looked_at(
    clocks: _Clocks, ages: FileAge
) -> None:
    stamp = clocks.wall()
    ages.look()
    clocks.now += 10 * SECOND
    ages.look()
    clocks.ahead += HOUR
    clocks.now += 5 * SECOND
    ages.look()

    assert ages.age_ns(stamp) == 15 * SECOND
    assert FileAge(clocks.wall, clocks.monotonic).age_ns(stamp) == 3615 * SECOND
