# SPDX-License-Identifier: Apache-2.0
"""What top shows: the status as a server tells it, with the rates of now."""

from dataclasses import replace
from typing import Any

import pytest

from imageserver.client.failures import Failed
from imageserver.client.showing.status import (
    Ended,
    Lately,
    Running,
    Slots,
    Status,
    Worker,
    parse_status,
    with_rates,
)

ONE = Running("a", "read", "10.0.0.1", 7, 100, 1000, 50.0, 2.0)
FIELDS: dict[str, Any] = {
    "id": "a",
    "operation": "read",
    "client": "10.0.0.1",
    "worker": 7,
    "done": 100,
    "expected": 1000,
    "rate": 50,
    "age": 2.0,
}
WORKER = {"worker": 7, "state": "accepting", "busy": 1}


def status(*transfers: Running, taken: float = 0.0) -> Status:
    return Status(transfers, (), taken)


def test_a_status_is_read() -> None:
    found = parse_status({"transfers": [FIELDS], "workers": [WORKER], "more": 1}, 5.0)
    assert found == Status((ONE,), (Worker(7, "accepting", 1),), 5.0)
    assert found.rate == 50


ENDED = {
    "id": "a\x1b[2J",
    "operation": "read",
    "client": "10.0.0.1",
    "worker": 7,
    "status": 500,
    "count": 2,
    "done": 3,
    "seconds": 1.5,
    "ago": 4.0,
    "error": "BackendError",
}


def test_what_has_ended_is_read_along_with_slots_refusals_and_readiness():
    more = {
        "slots": {"read": {"in_use": 1, "limit": 8, "limit_per_image": None}},
        "finished": [],
        "failed": [ENDED],
        "refusals": {"image_busy": 2},
        "readiness": {"status": "not ready", "failed": [{"check": "x", "problem": "full"}]},
    }
    found = parse_status({"transfers": [], "workers": []} | more, 5.0).lately
    (failed,) = found.failed
    assert failed == Ended(failed.id, "read", "10.0.0.1", 500, 2, 3, 1.5, 4.0, "BackendError")
    assert "\x1b" not in failed.id
    assert found == Lately({"read": Slots(1, 8, None)}, (), (failed,), {"image_busy": 2}, ("full",))


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "status",
        {},
        {"transfers": [], "workers": None},
        {"transfers": [{}], "workers": []},
        {"transfers": [FIELDS | {"done": "1"}], "workers": []},
        {"transfers": [FIELDS | {"age": True}], "workers": []},
        {"transfers": [1], "workers": []},
    ],
    ids=repr,
)
def test_what_is_no_status_is_told_so(answer: object) -> None:
    with pytest.raises(Failed, match="no status of an image server"):
        parse_status(answer, 0.0)


def test_nothing_gets_through_to_the_terminal() -> None:
    found = parse_status({"transfers": [FIELDS | {"id": "\x1b[2Jx\n"}], "workers": []}, 0.0)
    assert found.transfers[0].id == "?[2Jx?"


def test_a_rate_is_that_since_the_last_poll() -> None:
    later = replace(ONE, done=600, age=3.0, rate=200.0)
    now = with_rates(status(later, taken=11.0), status(ONE, taken=10.0))
    assert [transfer.rate for transfer in now.transfers] == [500.0]


def test_a_poll_that_came_late_changes_no_rate() -> None:
    later = replace(ONE, done=600, age=3.0)
    now = with_rates(status(later, taken=11.3), status(ONE, taken=10.0))
    assert now.transfers[0].rate == 500.0


def test_a_stalled_transfer_has_no_rate_and_no_end() -> None:
    now = with_rates(status(replace(ONE, age=3.0), taken=1.0), status(ONE))
    assert (now.transfers[0].rate, now.transfers[0].seconds_left) == (0.0, None)


@pytest.mark.parametrize(
    "later",
    [
        pytest.param(replace(ONE, age=0.5, done=10), id="began-since"),
        pytest.param(replace(ONE, age=9.0), id="began-at-another-time"),
        pytest.param(replace(ONE, age=3.0, done=99), id="went-back"),
        pytest.param(replace(ONE, age=3.0, worker=8), id="elsewhere"),
        pytest.param(replace(ONE, age=3.0, id="b"), id="of-another-image"),
    ],
)
def test_another_transfer_keeps_its_mean(later: Running) -> None:
    now = with_rates(status(later, taken=1.0), status(ONE))
    assert now == status(later, taken=1.0)


def test_transfers_that_look_alike_are_told_apart_by_their_beginning() -> None:
    before = status(ONE, replace(ONE, done=500, age=5.0), taken=0.0)
    later = (replace(ONE, done=600, age=6.0), replace(ONE, done=200, age=3.0))
    now = with_rates(status(*later, taken=1.0), before)
    assert [transfer.rate for transfer in now.transfers] == [100.0, 100.0]


def test_the_first_poll_shows_means() -> None:
    assert with_rates(status(ONE), Status((), (), 0)) == status(ONE)


def test_what_is_left_takes_its_time() -> None:
    assert (ONE.share, ONE.seconds_left) == (0.1, 18.0)
    unknown = replace(ONE, expected=0)
    assert (unknown.share, unknown.seconds_left) == (None, None)
