# SPDX-License-Identifier: Apache-2.0
"""A registration from its making to its end, over real files and a clock that is set."""

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import StateUnavailable, UnknownImage
from imageserver.core.ports import Account, Owned
from imageserver.core.transfer import Transfer, id_hash
from imageserver.transfers import registered as module
from imageserver.transfers.registered import RegistrationFiles
from imageserver.transfers.usage import ActivityFiles, OpenActivity

SECOND = 1_000_000_000


def _transfer(name: str, idle_seconds: int = 60, file: str = "/x") -> Transfer:
    return Transfer(name, FileImage(file), idle_seconds=idle_seconds)


class _Place:
    """The directories of a server, as one of its processes sees them, and its clock."""

    def __init__(self, path: Path) -> None:
        self.now_ns = 1000 * SECOND
        self.registered, self.activity = path / "registered", path / "activity"
        for directory in (self.registered, self.activity):
            directory.mkdir(mode=0o700)
        self.error: Exception | None = None
        self.files = self.another()

    def another(self) -> RegistrationFiles:
        """Return another process's view."""
        return RegistrationFiles(str(self.registered), self.activities(), self._require)

    def activities(self) -> ActivityFiles:
        return ActivityFiles(str(self.activity), lambda: self.now_ns)

    def _require(self) -> None:
        if self.error:
            raise self.error

    def monotonic_ns(self) -> int:
        return self.now_ns

    def pass_by(self, seconds: float) -> None:
        self.now_ns += round(seconds * SECOND)

    def ids(self) -> list[str]:
        assert self.files.count() == len(self.files.all())
        return [transfer.id for transfer in self.files.all()]

    def of(self, name: str) -> OpenActivity:
        found = self.activities().find(Owned.REGISTERED, name, visit=False)
        assert found is not None
        return found

    def visit(self, name: str) -> OpenActivity | None:
        return self.activities().find(Owned.REGISTERED, name, visit=True)

    def touch(self, name: str) -> None:
        with closing(self.of(name)) as activity:
            activity.touch()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Place:
    made = _Place(tmp_path)
    monkeypatch.setattr(module, "time", made)
    return made


def test_what_one_process_registers_all_know(place: _Place) -> None:
    place.files.store(_transfer("b"))
    place.files.store(_transfer("a"))
    other = place.another()

    assert other.all() == [_transfer("a"), _transfer("b")]
    assert other.count() == 2
    found = other.get("a")
    assert (found.image, found.idle_seconds) == (FileImage("/x"), 60)


def test_a_registration_is_replaced_as_a_whole(place: _Place) -> None:
    place.files.store(_transfer("a"))
    place.files.store(_transfer("a", 5, "/y"))

    assert place.another().all() == [_transfer("a", 5, "/y")]
    assert os.listdir(place.registered) == [id_hash("a")]


def test_what_was_removed_is_unknown_and_lets_nobody_in(place: _Place) -> None:
    place.files.store(_transfer("a"))
    place.files.remove("a")
    place.files.remove("a")

    with pytest.raises(UnknownImage):
        place.another().get("a")
    assert place.ids() == []
    assert place.visit("a") is None
    with closing(place.of("a")) as activity:
        assert activity.is_closed


def test_who_is_there_stays_until_the_end_and_is_forgotten_then(place: _Place) -> None:
    place.files.store(_transfer("a"))
    visit = place.visit("a")
    assert visit is not None
    place.files.remove("a")

    place.files.forget("a")
    with closing(place.of("a")) as watched:
        assert watched.visitors() == 1
    visit.close()
    place.files.forget("a")
    place.files.forget("a")
    assert os.listdir(place.activity) == []


def test_what_is_registered_again_meanwhile_is_not_forgotten(place: _Place) -> None:
    place.files.store(_transfer("a"))
    place.files.remove("a")
    place.files.store(_transfer("a"))
    place.files.forget("a")

    visit = place.visit("a")
    assert visit is not None
    visit.close()


def test_what_was_done_with_an_id_outlives_its_replacement(place: _Place) -> None:
    place.files.store(_transfer("a"))
    with closing(place.of("a")) as activity:
        activity.add(Account(10, 20, None), wait=True)
    place.files.store(_transfer("a", file="/y"))

    with closing(place.of("a")) as activity:
        assert activity.account() == Account(10, 20, None)


def test_a_registration_expires_when_nobody_has_used_it_for_its_time(place: _Place) -> None:
    place.files.store(_transfer("short", 5))
    place.files.store(_transfer("long", 60))
    place.pass_by(4.9)
    assert place.ids() == ["long", "short"]
    place.pass_by(0.1)
    assert place.ids() == ["long"]


def test_a_registration_counts_as_long_as_a_request_is_in_flight_that_notes_no_use(
    place: _Place,
) -> None:
    place.files.store(_transfer("a", 5))
    visit = place.visit("a")
    assert visit
    place.pass_by(100)
    place.files.prune(lambda _: False)
    with closing(visit):
        assert place.ids() == ["a"]
    place.files.prune(lambda _: False)

    assert (place.files.all(), os.listdir(place.registered)) == ([], [])


def test_use_through_another_process_makes_it_last(place: _Place) -> None:
    place.files.store(_transfer("a", 5))
    for _ in range(3):
        place.pass_by(4)
        place.touch("a")
        assert place.ids() == ["a"]
    place.pass_by(5)

    assert place.ids() == []


def test_who_registers_again_begins_anew(place: _Place) -> None:
    place.files.store(_transfer("a", 5))
    place.pass_by(4)
    place.files.store(_transfer("a", 5))
    place.pass_by(4)

    assert place.ids() == ["a"]


@pytest.mark.parametrize(
    ("has_file", "left"),
    [
        pytest.param(lambda _: False, ["long"], id="gone"),
        # Else the control program's file would come to light.
        pytest.param(lambda name: name == "short", ["long", "short"], id="hides"),
    ],
)
def test_what_has_expired_is_pruned_but_for_what_hides_a_file(
    place: _Place, has_file: Callable[[str], bool], left: list[str]
) -> None:
    place.files.store(_transfer("short", 5))
    place.files.store(_transfer("long", 6000))
    place.pass_by(100)
    place.files.prune(has_file)

    names = sorted(map(id_hash, left))
    assert sorted(os.listdir(place.registered)) == names
    assert sorted(os.listdir(place.activity)) == [f"registered-{name}" for name in names]


def test_what_a_writer_that_died_has_left_is_removed_at_the_next_start(place: _Place) -> None:
    place.files.store(_transfer("a"))
    (place.registered / "new-0123").write_bytes(b"{")
    (place.activity / f"registered-{id_hash('a')}").unlink()  # as a reboot may
    assert place.ids() == []

    place.another().recover()

    assert place.ids() == ["a"]
    assert os.listdir(place.registered) == [id_hash("a")]


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda files: files.get("a"), id="get"),
        pytest.param(lambda files: files.store(_transfer("b")), id="store"),
        pytest.param(lambda files: files.remove("a"), id="remove"),
        pytest.param(lambda files: files.count(), id="count"),
        pytest.param(lambda files: files.all(), id="all"),
    ],
)
def test_in_a_directory_that_is_not_everybodys_nothing_is_done(
    place: _Place, ask: Callable[[RegistrationFiles], object]
) -> None:
    place.files.store(_transfer("a"))
    place.error = StateUnavailable("replaced")
    with pytest.raises(StateUnavailable, match="replaced"):
        ask(place.files)

    place.error = None
    assert place.ids() == ["a"]
