# SPDX-License-Identifier: Apache-2.0
"""Activity files, on real ones with a clock of our own: visitors are counted by the kernel."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imageserver.core.errors import StateFull, StateUnavailable
from imageserver.core.ports import Account, Owned
from imageserver.core.transfer import id_hash
from imageserver.transfers import usage as module
from imageserver.transfers.usage import ActivityFiles

SECOND = 1_000_000_000


class _Place:
    """An activity directory and a clock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1000 * SECOND
        self.files = self.another()

    def another(self) -> ActivityFiles:
        """Return another process's view."""
        return ActivityFiles(str(self.path), lambda: self.now)


@pytest.fixture
def place(tmp_path: Path) -> _Place:
    return _Place(tmp_path)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_visitors_are_counted_whoever_they_are(place: _Place, count: int) -> None:
    watched = place.files.make(Owned.FILE, "x")
    visits = [place.another().make(Owned.FILE, "x") for _ in range(count)]
    place.files.make(Owned.FILE, "y")

    assert watched.visitors() == count

    for visit in visits:
        visit.close()
    assert watched.visitors() == 0


def test_visitors_are_counted_that_have_been_there_for_longer(place: _Place) -> None:
    watched = place.files.make(Owned.FILE, "x")
    for _ in range(3):
        place.another().make(Owned.FILE, "x")
        place.now += SECOND

    assert [watched.visitors(seconds * SECOND) for seconds in range(4)] == [3, 2, 1, 0]


def test_holds_are_seen_by_others_until_they_are_closed_and_are_no_visits(place: _Place) -> None:
    watched = place.files.make(Owned.FILE, "x")
    holds = [place.another().find(Owned.FILE, "x", visit=False) for _ in range(2)]
    seen = [watched.is_held()]
    for hold in holds:
        assert hold is not None
        hold.hold()
    for hold in holds:
        assert hold is not None
        seen.append(watched.is_held())
        hold.close()
    seen.append(watched.is_held())

    assert seen == [False, True, True, False]
    assert watched.visitors() == 0
    watched.close()


def test_who_only_looks_is_no_visitor(place: _Place) -> None:
    visit = place.files.make(Owned.FILE, "x")
    assert place.files.find(Owned.FILE, "x", visit=False)
    assert visit.visitors() == 0


def test_a_visitor_that_dies_is_none_any_more(place: _Place) -> None:
    watched = place.files.make(Owned.FILE, "x")
    pid = os.fork()
    if not pid:
        place.another().make(Owned.FILE, "x")
        os._exit(0)
    os.waitpid(pid, 0)
    assert watched.visitors() == 0


def test_what_is_unknown_is_not_found(place: _Place) -> None:
    assert place.files.find(Owned.FILE, "x", visit=True) is None
    place.files.make(Owned.FILE, "x").close()
    assert place.files.find(Owned.REGISTERED, "x", visit=True) is None


def test_idle_time_counts_from_the_latest_touch_of_all(place: _Place) -> None:
    one, other = place.files.make(Owned.FILE, "x"), place.another().make(Owned.FILE, "x")
    place.now += 5 * SECOND
    assert one.idle_ns() == 5 * SECOND
    other.touch()
    place.now += SECOND
    assert one.idle_ns() == SECOND


def test_visits_that_began_are_cut_and_later_ones_are_not(place: _Place) -> None:
    activity = place.files.make(Owned.FILE, "x")
    assert not activity.is_cut(place.now)
    activity.cut()
    assert activity.is_cut(place.now)
    assert not activity.is_cut(place.now + 1)


def test_nothing_that_is_added_gets_lost(place: _Place) -> None:
    def add(number: int) -> bool:
        visit = place.another().make(Owned.FILE, "x")
        done = Account(1, 2, "last" if number == 50 else None)
        return visit.add(done, wait=True)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(add, range(200)))
    activity = place.files.find(Owned.FILE, "x", visit=False)
    assert activity
    assert activity.account() == Account(200, 400, "last")


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        pytest.param("", None, id="empty"),
        pytest.param("\u00fc" * 200, "\u00fc" * 128, id="long"),
        pytest.param("a" * 255 + "\u00fc", "a" * 255 + "\ufffd", id="cut-in-a-character"),
    ],
)
def test_an_error_is_kept_as_far_as_there_is_room(
    place: _Place, error: str, kept: str | None
) -> None:
    activity = place.files.make(Owned.FILE, "x")
    activity.add(Account(0, 0, error), wait=True)
    assert activity.account() == Account(0, 0, kept)


def test_who_adds_does_not_wait_unless_asked_to(place: _Place) -> None:
    one, other = place.files.make(Owned.FILE, "x"), place.another().make(Owned.FILE, "x")
    with one._alone(wait=True):
        assert not other.add(Account(1), wait=False)
    assert other.add(Account(1), wait=False)


def test_a_closed_activity_lets_nobody_in(place: _Place) -> None:
    activity = place.files.make(Owned.REGISTERED, "x")
    activity.set_closed(closed=True)
    assert place.files.find(Owned.REGISTERED, "x", visit=True) is None
    assert place.files.find(Owned.REGISTERED, "x", visit=False)
    assert activity.visitors() == 0
    activity.set_closed(closed=False)
    assert place.files.find(Owned.REGISTERED, "x", visit=True)


def test_who_has_a_removed_file_open_does_not_enter_it(place: _Place) -> None:
    place.files.make(Owned.FILE, "x").close()
    late = place.files.find(Owned.FILE, "x", visit=False)
    assert late
    late.remove()
    assert not late.enter()
    fresh = place.files.make(Owned.FILE, "x")
    assert fresh.visitors() == 0


def test_another_boot_begins_anew(place: _Place, monkeypatch: pytest.MonkeyPatch) -> None:
    activity = place.files.make(Owned.FILE, "x")
    activity.add(Account(1, 1, "error"), wait=True)
    activity.cut()
    activity.close()
    monkeypatch.setattr(module, "boot_id", lambda: bytes(16))
    place.now = 5 * SECOND

    later = place.another().find(Owned.FILE, "x", visit=True)

    assert later
    assert (later.idle_ns(), later.account(), later.is_cut(1)) == (0, Account(), False)


def test_pruning_removes_what_is_unknown_unused_and_old(place: _Place) -> None:
    for name in ("known", "unknown", "visited"):
        place.files.make(Owned.FILE, name).close()
    place.files.make(Owned.REGISTERED, "registered").close()
    visit = place.files.find(Owned.FILE, "visited", visit=True)

    assert place.files.prune(Owned.FILE, "known".__eq__) == 0
    place.now += 61 * SECOND
    assert place.files.prune(Owned.FILE, "known".__eq__) == 1
    assert visit
    visit.close()
    assert place.files.prune(Owned.FILE, "known".__eq__) == 1
    assert len(list(place.path.iterdir())) == 2


# Damage, and no room


def _file(place: _Place, name: str = "x") -> Path:
    return place.path / f"file-{id_hash(name)}"


@pytest.mark.parametrize("size", [0, 7, 30, 575])
def test_a_file_that_is_cut_short_begins_anew_for_those_who_have_it_open(
    place: _Place, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    visit = place.files.make(Owned.FILE, "x")
    visit.changed_ns = 5
    watched = place.files.find(Owned.FILE, "x", visit=False)
    assert watched
    place.now += 50 * SECOND
    os.truncate(_file(place), size)

    assert (watched.idle_ns(), watched.visitors(), watched.is_cut(1)) == (0, 1, False)
    place.now += SECOND
    assert visit.add(Account(1, 2, "error"), wait=False)
    assert (watched.account(), watched.idle_ns()) == (Account(1, 2, "error"), SECOND)
    assert len(caplog.records) == bool(size)
    visit.begin("x")
    assert (visit.changed_ns, _file(place).stat().st_size) == (0, 584)


@pytest.mark.parametrize("spoil", ["zeros", "noise", "future"])
def test_a_file_that_was_written_over_neither_lives_for_ever_nor_expires(
    place: _Place, spoil: str
) -> None:
    place.files.make(Owned.FILE, "x").close()
    text = _file(place).read_bytes()
    spoilt = {"zeros": bytes(584), "noise": b"\xff" * 584, "future": text[:24] + b"\x7f" * 500}
    _file(place).write_bytes(spoilt[spoil])

    found = place.files.find(Owned.FILE, "x", visit=True)
    assert found
    place.now += 9 * SECOND
    assert (found.idle_ns(), found.account()) == (9 * SECOND, Account())


def test_what_is_pruned_is_not_what_was_damaged_while_its_transfer_is_there(place: _Place) -> None:
    place.files.make(Owned.FILE, "x").close()
    os.truncate(_file(place), 10)
    place.files.prune(Owned.FILE, "x".__eq__)
    place.now += 3600 * SECOND
    assert place.files.prune(Owned.FILE, "x".__eq__) == 0

    found = place.files.find(Owned.FILE, "x", visit=False)  # now it is known whose it is
    assert found
    assert found.idle_ns() == 3600 * SECOND
    assert place.files.prune(Owned.FILE, "y".__eq__) == 1


def test_damage_that_nobody_asks_for_is_pruned_after_a_day(place: _Place) -> None:
    place.files.make(Owned.FILE, "x").close()
    os.truncate(_file(place), 10)
    assert place.files.prune(Owned.FILE, "x".__eq__) == 0
    place.now += 86_401 * SECOND
    assert place.files.prune(Owned.FILE, "x".__eq__) == 1


def test_one_file_that_cannot_be_opened_does_not_keep_the_others_from_being_pruned(
    place: _Place, caplog: pytest.LogCaptureFixture
) -> None:
    _file(place, "directory").mkdir()
    for name in "abc":
        place.files.make(Owned.FILE, name).close()
    place.now += 61 * SECOND

    assert place.files.prune(Owned.FILE, lambda _: False) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_new_file_without_room_is_an_error_of_ours_and_leaves_nothing(
    place: _Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StateFull, match="the records of use cannot be used now: No space"):
            place.files.make(Owned.FILE, "x")

    assert (list(place.path.iterdir()), len(os.listdir("/proc/self/fd"))) == ([], before)
    place.files.make(Owned.FILE, "x").close()


@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_file_that_cannot_be_opened_or_read_is_an_error_of_ours_and_no_descriptor_is_lost(
    place: _Place, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    place.files.make(Owned.FILE, "x").close()
    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(StateUnavailable, match="Input/output error"):
            place.files.find(Owned.FILE, "x", visit=True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_visit_and_its_sums_take_one_look_at_the_record_each(
    place: _Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    pread = os.pread

    def look(fd: int, size: int, at: int) -> bytes:
        looks.append(fd)
        return pread(fd, size, at)

    place.files.make(Owned.FILE, "x").close()
    monkeypatch.setattr(os, "pread", look)
    activity = place.files.find(Owned.FILE, "x", visit=True)
    assert activity is not None
    assert len(looks) == 1
    assert activity.add(Account(1, 2, None), wait=True)
    assert len(looks) == 2
    activity.close()
