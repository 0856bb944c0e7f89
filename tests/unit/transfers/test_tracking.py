# SPDX-License-Identifier: Apache-2.0
"""Requests over real activity files: which transfers count at what time; the beat."""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import Exhausted, StateFull, StateUnavailable, UnknownImage
from imageserver.core.ports import Account, Owned
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer, id_hash
from imageserver.transfers.fileage import FileAge
from imageserver.transfers.lookup import Catalogue
from imageserver.transfers.requests import Request
from imageserver.transfers.tracking import Tracker, Use
from imageserver.transfers.usage import ActivityFiles
from tests.unit.fakes import FakeSlots, World, a_request
from tests.unit.shortages import no_threads

SECOND = 1_000_000_000
IDLE = 100
HOUR = 3600 * SECOND


class _Place:
    """Transfers that are unknown after ``IDLE`` seconds, and the clocks that tell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 5000 * SECOND
        self.ahead = 1_700_000_000 * SECOND
        self.known: dict[str, Transfer] = {}
        self.activities = ActivityFiles(str(path), lambda: self.now)
        self.ages = FileAge(lambda: self.now + self.ahead, lambda: self.now)
        self.tracker = Tracker(
            Catalogue(_Known(self.known), None, self.activities, self.ages),
            lambda: None,
            lambda: self.now,
        )

    def write(self, name: str) -> None:
        """Let a control program write a file now."""
        self.known[name] = Transfer(
            name, FileImage("/x"), idle_seconds=IDLE, changed_ns=self.now + self.ahead
        )

    def pass_(self, seconds: int) -> None:
        self.now += seconds * SECOND

    def begin(self, name: str, disconnect: Callable[[], None] = lambda: None) -> Request:
        request = a_request(disconnect=disconnect)
        self.tracker.enter(request, name)
        return request

    def use(self, name: str) -> None:
        self.begin(name).leave()

    def is_known(self, name: str) -> bool:
        """Tell whether a request would be let in, without one."""
        try:
            Catalogue(_Known(self.known), None, self.activities, self.ages).find(name, visit=False)
        except UnknownImage:
            return False
        return True

    def file(self, name: str) -> Path:
        return self.path / f"file-{id_hash(name)}"


class _Known(dict[str, Transfer]):
    """``ports.Transfers``."""

    def __init__(self, known: dict[str, Transfer]) -> None:
        self._known = known

    def get(self, transfer_id: str) -> Transfer:  # type: ignore[override]
        if transfer_id not in self._known:
            raise UnknownImage(transfer_id)
        return self._known[transfer_id]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[_Place]:
    made = _Place(tmp_path)
    yield made
    for use in list(made.tracker._uses):
        use.close()


# The system's clock is set


@pytest.mark.parametrize("hours", [-1000, -1, 1, 1000])
def test_a_transfer_in_use_and_one_out_of_use_do_not_notice_that_the_clock_is_set(
    place: _Place, hours: int
) -> None:
    place.write("x")
    place.pass_(10)
    place.use("x")
    place.ahead += hours * HOUR
    place.pass_(IDLE - 1)
    place.use("x")
    place.pass_(IDLE - 1)
    assert place.is_known("x")

    place.pass_(1)
    assert not place.is_known("x")


@pytest.mark.parametrize("hours", [-1000, -1, 1, 1000])
def test_a_transfer_that_was_never_used_does_not_notice_it_either(
    place: _Place, hours: int
) -> None:
    place.write("early")
    place.write("late")
    place.pass_(10)
    place.ahead += hours * HOUR
    place.pass_(IDLE - 11)
    place.use("early")
    place.pass_(1)

    assert [place.is_known("early"), place.is_known("late")] == [True, False]


def test_a_file_of_a_time_to_come_expires_when_it_was_used_last(place: _Place) -> None:
    place.ahead += HOUR
    place.write("x")
    place.ahead -= HOUR
    place.use("x")
    place.pass_(IDLE)
    assert not place.is_known("x")


def test_a_changed_file_begins_anew(place: _Place) -> None:
    place.write("x")
    place.use("x")
    place.pass_(IDLE)
    assert not place.is_known("x")
    place.write("x")
    place.pass_(IDLE - 1)
    place.use("x")


# The beat


def test_a_damaged_record_neither_ends_the_beat_nor_spares_others_their_cut(place: _Place) -> None:
    for name in ("a", "b"):
        place.write(name)
    cut: list[str] = []
    requests = [place.begin(name, lambda name=name: cut.append(name)) for name in ("a", "b")]  # type: ignore[misc]
    os.truncate(place.file("a"), 30)
    requests[0].needs("read", Kind.READ)
    requests[0].progress(5)
    asked = place.activities.find(Owned.FILE, "b", visit=False)
    assert asked
    asked.cut()

    assert place.tracker.beat() == frozenset()
    assert cut == ["b"]
    found = place.activities.find(Owned.FILE, "a", visit=False)
    assert found
    assert (found.account(), found.visitors()) == (Account(5), 1)


@pytest.mark.parametrize("error", [StateUnavailable("gone"), ZeroDivisionError()], ids=repr)
def test_a_visit_that_cannot_beat_is_told_of_once_and_stops_no_other(
    place: _Place,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in "abc":
        place.write(name)
    requests = [place.begin(name) for name in "abc"]
    beaten: list[Use] = []
    uses = {use._request: use for use in place.tracker._uses}

    def beat(use: Use) -> None:
        beaten.append(use)
        if use._request is requests[1]:
            raise error

    monkeypatch.setattr(Use, "beat", beat)
    failing = place.tracker.beat()
    assert place.tracker.beat(failing) == failing == {uses[requests[1]]}

    assert (len(beaten), set(beaten)) == (6, set(uses.values()))
    assert len(caplog.records) == 1


def test_a_visit_ends_whatever_can_be_noted_of_it(
    place: _Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write("x")
    request = place.begin("x")
    watched = place.activities.find(Owned.FILE, "x", visit=False)
    assert watched
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fails(errno.ENOSPC))
        request.holds(FakeSlots(World()))
        request.failed(ZeroDivisionError())
        request.leave()
        request.leave()

    assert (watched.visitors(), len(place.tracker._uses)) == (0, 0)


def test_where_no_thread_is_to_be_had_a_visit_fails_and_the_next_one_asks_again(
    place: _Place,
) -> None:
    place.write("x")
    with no_threads():
        with pytest.raises(Exhausted, match="can't start new thread"):
            place.begin("x")
        probe = a_request()
        place.tracker.enter(probe, "x", probes=True)
        probe.leave()
    watched = place.activities.find(Owned.FILE, "x", visit=False)
    assert watched
    assert watched.visitors() == 0
    place.begin("x").check()


# No room


def _fails(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def test_where_use_cannot_be_noted_probes_are_answered_and_transfers_refused(
    place: _Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write("x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fails(errno.ENOSPC))
        assert place.tracker.enter(a_request(), "x", probes=True) == place.known["x"]
        assert place.tracker._uses == set()
        with pytest.raises(StateFull):
            place.begin("x")
        place.pass_(IDLE)
        with pytest.raises(UnknownImage):
            place.tracker.enter(a_request(), "x", probes=True)
    place.write("x")
    place.use("x")


def test_a_registered_transfer_counts_by_its_use_alone(place: _Place) -> None:
    """Its file's time is the system's, and registering it is use."""
    registered = {id_hash("x"): replace(Transfer("x", FileImage("/x")), idle_seconds=IDLE)}
    known = _Known({"x": registered[id_hash("x")]})
    catalogue = Catalogue(_Known({}), known, place.activities, place.ages)
    place.activities.make(Owned.REGISTERED, "x").close()
    place.pass_(IDLE - 1)
    activity = catalogue.find("x").activity
    assert activity
    activity.close()
    place.pass_(1)
    with pytest.raises(UnknownImage):
        catalogue.find("x")


@pytest.mark.parametrize("owned", Owned)
def test_a_request_in_flight_of_a_stopped_worker_keeps_its_transfer_and_a_look_does_not(
    place: _Place, owned: Owned
) -> None:
    known = {
        name: Transfer("x", FileImage("/x"), idle_seconds=IDLE) for name in ("x", id_hash("x"))
    }
    files, registered = _Known(known), _Known(known if owned is Owned.REGISTERED else {})
    catalogue = Catalogue(files, registered, place.activities, place.ages)

    def is_known() -> bool:
        try:
            activity = catalogue.find("x").activity
        except UnknownImage:
            return False
        assert activity
        activity.close()
        return True

    in_flight = place.activities.make(owned, "x")  # whose worker notes no use
    place.pass_(IDLE)
    looking = place.activities.find(owned, "x", visit=True)
    place.pass_(3 * IDLE)
    seen = [is_known()]
    in_flight.close()
    seen.append(is_known())
    assert looking
    looking.close()

    assert seen == [True, False]
