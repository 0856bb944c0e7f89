# SPDX-License-Identifier: Apache-2.0
"""How long imagectl waits before it asks again."""

import pytest

from imageserver.client.backoff import FailureStreak, RetryBudget, retried, wait_seconds
from imageserver.client.failures import Broken, Busy, Unreachable


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def budget(clock: Clock) -> RetryBudget:
    return RetryBudget(60, clock, lambda: 1.0)


def test_waits_double_up_to_a_limit():
    waits = [wait_seconds(failures, None, 1.0) for failures in (1, 2, 3, 6, 7, 1000)]
    assert waits == [0.1, 0.2, 0.4, 3.2, 5.0, 5.0]


def test_jitter_halves_a_wait_at_most():
    assert wait_seconds(3, None, 0.0) == 0.2


def test_retry_after_is_the_least_that_is_waited():
    assert wait_seconds(1, 2.0, 1.0) == 2.0
    assert wait_seconds(7, 2.0, 1.0) == 5.0
    assert wait_seconds(1, 3600.0, 1.0) == 10.0


def test_patience_ends_so_long_after_the_first_failure(budget: RetryBudget, clock: Clock):
    failures, error = FailureStreak(), Broken("gone")
    clock.now += 1000  # a silent server: the failure itself took long
    budget.after(failures, error)
    clock.now += 59.9
    assert budget.after(failures, error) == pytest.approx(0.1)
    clock.now += 0.1
    with pytest.raises(Broken, match="gone"):
        budget.after(failures, error)


def test_progress_of_any_connection_renews_patience(budget: RetryBudget, clock: Clock):
    failures, error = FailureStreak(), Busy("full")
    budget.after(failures, error)
    clock.now += 59
    budget.progress()
    clock.now += 59
    assert budget.after(failures, error) == pytest.approx(0.2)


def test_without_patience_the_first_failure_is_the_last(clock: Clock):
    with pytest.raises(Busy):
        RetryBudget(0, clock).after(FailureStreak(), Busy("full"))


def test_only_what_may_help_is_tried_again(budget: RetryBudget):
    answers = iter([Busy("full"), Unreachable("nobody")])

    def ask():
        raise next(answers)

    with pytest.raises(Unreachable):
        retried(ask, budget, Busy)


def test_who_waits_is_told_why_once_until_something_moves(budget, clock, caplog):
    def fail(after: float) -> None:
        clock.now += after
        budget.after(failures, Busy("busy"))

    failures = FailureStreak()
    for seconds in (1, 1, 1, 1):
        fail(seconds)
    assert caplog.messages == ["imagectl: busy; trying again for 58 s"]
    budget.progress()
    failures = FailureStreak()
    for seconds in (1, 1, 2):
        fail(seconds)
    assert caplog.messages[1:] == ["imagectl: busy; trying again for 57 s"]
