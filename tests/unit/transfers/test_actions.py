# SPDX-License-Identifier: Apache-2.0
"""What a control program can have done, over fakes and a clock that passes while one sleeps."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.control_protocol import Command, List, Register, Status, Unregister
from imageserver.core.errors import UnknownImage
from imageserver.core.ports import Account, Owned
from imageserver.core.transfer import InvalidTransfer, Transfer
from imageserver.transfers import actions as module
from imageserver.transfers.actions import Administration

if TYPE_CHECKING:
    from imageserver.transfers.visits import Catalogue

DEFAULT_IDLE = 600
ONE = Transfer("x", FileImage("/x"), idle_seconds=5)


@dataclass
class _Activity:
    """What is known of one transfer's use; ``visitors_left`` says how many are there."""

    journal: list[str]
    visitors_left: Callable[[], int] = lambda: 0
    idle: int = 1_234_567_890
    sums: Account = field(default_factory=lambda: Account(10, 20, "last"))
    #: Until when, by the world's clock, connections are kept on its behalf.
    is_held: Callable[[], bool] = lambda: False

    def visitors(self) -> int:
        return self.visitors_left()

    def idle_ns(self) -> int:
        return self.idle

    def account(self) -> Account:
        return self.sums

    def cut(self) -> None:
        self.journal.append("cut")

    def close(self) -> None:
        self.journal.append("close")


class _World:
    """Registrations, activities and catalogue in one, and what was asked of them."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.journal: list[str] = []
        self.stored: dict[str, Transfer] = {}
        self.files: set[str] = set()
        self.used: dict[str, _Activity] = {}
        self.wanted_until = float("inf")
        self.administration = Administration(
            cast("Any", self),
            cast("Any", SimpleNamespace(find=self.find_activity)),
            cast("Catalogue", SimpleNamespace(find=self.find_transfer)),
            DEFAULT_IDLE,
            self.sleep,
        )

    # The clock

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.journal.append("sleep")
        self.seconds += seconds

    # ``ports.Registrations``

    def store(self, transfer: Transfer) -> None:
        if transfer.id == "large":
            raise InvalidTransfer("too large")
        self.stored[transfer.id] = transfer

    def remove(self, transfer_id: str) -> None:
        self.journal.append("remove")
        self.stored.pop(transfer_id, None)

    def forget(self, transfer_id: str) -> None:
        self.journal.append("forget")
        del self.used[transfer_id]

    def count(self) -> int:
        return len(self.stored)

    def all(self) -> list[Transfer]:
        return [self.stored[name] for name in sorted(self.stored)]

    def find_activity(self, owned: Owned, transfer_id: str, *, visit: bool) -> _Activity | None:
        assert (owned, visit) == (Owned.REGISTERED, False)
        return self.used.get(transfer_id)

    def find_transfer(self, transfer_id: str, *, visit: bool) -> object:
        assert not visit
        if transfer_id not in self.stored and transfer_id not in self.files:
            raise UnknownImage(transfer_id)
        return SimpleNamespace(activity=self.used.get(transfer_id))

    def use(self, visitors_left: Callable[[], int] = lambda: 0) -> _Activity:
        """Register a transfer that is used."""
        self.stored["x"] = ONE
        activity = self.used["x"] = _Activity(self.journal, visitors_left)
        return activity

    def run(self, command: Command) -> Any:
        answer = self.administration.run(command, lambda: self.seconds < self.wanted_until)
        assert answer.endswith(b"\n")
        return json.loads(answer)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> _World:
    made = _World()
    monkeypatch.setattr(module, "time", made)
    return made


def _ok(active: int, **more: object) -> dict[str, object]:
    return {"status": "ok", "active_transfers": active} | more


BUSY = {"status": "error", "message": "busy"}

# Registering


@pytest.mark.parametrize(("idle", "stored"), [(None, DEFAULT_IDLE), (5, 5)])
def test_who_says_no_idle_time_gets_the_default(
    world: _World, idle: int | None, stored: int
) -> None:
    transfer = replace(ONE, idle_seconds=idle)

    assert world.run(Register(transfer)) == _ok(1)
    assert world.stored == {"x": replace(ONE, idle_seconds=stored)}


def test_who_registers_is_told_which_fields_are_ignored(world: _World) -> None:
    told = world.run(Register(replace(ONE, ignored=('unknown field "a"',))))
    assert told == _ok(1, warnings=['unknown field "a"'])


def test_what_cannot_be_stored_is_told_so(world: _World) -> None:
    refused = world.run(Register(replace(ONE, id="large")))
    assert refused == {"status": "error", "message": "invalid config: too large"}
    assert world.stored == {}


# Asking


def test_status_counts_what_is_registered(world: _World) -> None:
    assert world.run(Status()) == _ok(0)
    world.run(Register(ONE))
    assert world.run(Status()) == _ok(1)


@pytest.mark.parametrize(("visitors", "idle"), [(0, 1.235), (3, 0.0)])
def test_status_of_one_tells_its_use(world: _World, visitors: int, idle: float) -> None:
    world.use(lambda: visitors)

    assert world.run(Status("x")) == _ok(
        1,
        requests_in_flight=visitors,
        bytes_read=10,
        bytes_written=20,
        last_error="last",
        idle_seconds=idle,
    )
    assert world.journal == ["close"]


def test_status_of_what_nobody_keeps_track_of_is_not_known(world: _World) -> None:
    world.files.add("file")
    names = ("bytes_read", "bytes_written", "idle_seconds", "last_error", "requests_in_flight")
    assert world.run(Status("file")) == _ok(0) | dict.fromkeys(names)


def test_status_of_an_unknown_one_says_so(world: _World) -> None:
    assert world.run(Status("x")) == {"status": "error", "message": "unknown transfer_id"}


@pytest.mark.parametrize(("after", "ids"), [("", "abc"), ("a", "bc"), ("aa", "bc"), ("c", "")])
def test_a_list_has_what_comes_after_an_id(world: _World, after: str, ids: str) -> None:
    for name in "bca":
        world.run(Register(replace(ONE, id=name)))

    listed = world.run(List(after))
    assert [each["transfer_id"] for each in listed["transfers"]] == list(ids)
    assert (listed["active_transfers"], listed["more"]) == (3, False)


# Unregistering


def test_what_was_never_known_is_unregistered(world: _World) -> None:
    assert world.run(Unregister("x")) == _ok(0)
    assert world.journal == ["remove"]


@pytest.mark.parametrize("impossible", ["a/b", "..", "*", "a\0", "x" * 256])
def test_what_can_be_no_id_is_unregistered_with_a_word(world: _World, impossible: str) -> None:
    told = world.run(Unregister(impossible))

    assert told == _ok(0, warnings=["no transfer can have this id"])
    assert world.journal == []


def test_what_nobody_uses_goes_at_once(world: _World) -> None:
    world.use()

    assert world.run(Unregister("x", timeout=0.0)) == _ok(0)
    assert world.journal == ["remove", "close", "forget"]


@pytest.mark.parametrize("timeout", [None, 0.0, 0.5])
def test_connections_that_are_kept_for_it_are_closed_first(
    world: _World, timeout: float | None
) -> None:
    world.use().is_held = lambda: world.seconds < 1001

    assert world.run(Unregister("x", timeout)) == _ok(0)
    assert world.seconds == pytest.approx(1001, abs=0.03)
    assert world.journal[-2:] == ["close", "forget"]


def test_a_worker_that_does_not_close_them_makes_it_busy(world: _World) -> None:
    world.use().is_held = lambda: True

    assert world.run(Unregister("x", 0.5)) == BUSY
    assert world.seconds == pytest.approx(1002, abs=0.03)
    assert world.journal[-1] == "close"


def test_a_transfer_is_unknown_first_and_forgotten_when_the_last_request_has_ended(
    world: _World,
) -> None:
    world.use(lambda: int("x" in world.stored or world.seconds < 1030))

    assert world.run(Unregister("x")) == _ok(0)
    assert world.journal[0] == "remove"
    assert world.journal[-2:] == ["close", "forget"]
    assert world.seconds == pytest.approx(1030, abs=0.03)


@pytest.mark.parametrize("timeout", [0.0, 0.5])
def test_who_waits_only_so_long_is_told_busy_and_may_ask_again(
    world: _World, timeout: float
) -> None:
    left = [1]
    world.use(lambda: left[0])

    assert world.run(Unregister("x", timeout)) == BUSY
    assert world.seconds == pytest.approx(1000 + timeout, abs=0.03)
    assert ("x" in world.stored, "x" in world.used, world.journal[-1]) == (False, True, "close")

    left[0] = 0
    assert world.run(Unregister("x", timeout)) == _ok(0)
    assert world.used == {}


@pytest.mark.parametrize("force", [False, True])
def test_who_says_no_time_is_told_after_the_servers_own_that_requests_go_on(
    world: _World, force: bool
) -> None:
    world.administration = replace(world.administration, default_wait=4.0)
    world.use(lambda: 1)
    world.stored["other"] = ONE

    assert world.run(Unregister("x", force=force)) == _ok(1, busy=True)
    assert world.seconds == pytest.approx(1004, abs=0.03)
    assert ("x" in world.stored, world.journal[-1]) == (False, "close")


@pytest.mark.parametrize(("timeout", "waited"), [(0.5, 0.5), (9.0, 9.0)])
def test_a_time_that_is_said_wins_over_the_servers_own(
    world: _World, timeout: float, waited: float
) -> None:
    world.administration = replace(world.administration, default_wait=4.0)
    world.use(lambda: 1)

    assert world.run(Unregister("x", timeout)) == BUSY
    assert world.seconds == pytest.approx(1000 + waited, abs=0.03)


def test_who_does_not_want_to_know_any_more_is_not_waited_for(world: _World) -> None:
    world.use(lambda: 1)
    world.wanted_until = 1002.0

    assert world.run(Unregister("x")) == _ok(0, busy=True)  # for the log: nobody reads it
    assert world.seconds == pytest.approx(1002, abs=0.03)
    assert world.journal[-1] == "close"


@pytest.mark.parametrize("timeout", [None, 0.0, 0.5])
def test_force_cuts_and_has_a_second_for_it(world: _World, timeout: float | None) -> None:
    world.use(lambda: int("cut" not in world.journal or world.seconds < 1000.9))

    assert world.run(Unregister("x", timeout, force=True)) == _ok(0)
    assert world.journal[:2] == ["remove", "cut"]


def test_force_that_is_not_heeded_is_busy_after_its_time(world: _World) -> None:
    world.use(lambda: 1)

    assert world.run(Unregister("x", 0.1, force=True)) == BUSY
    assert world.seconds == pytest.approx(1001, abs=0.03)
