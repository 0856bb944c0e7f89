# SPDX-License-Identifier: Apache-2.0
"""Sessions of several writers of one export, over fake ports (docs/api.md)."""

from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.errors import (
    ImageBusy,
)
from imageserver.core.kinds import ImageInfo
from imageserver.core.transfer import Transfer
from imageserver.images import sessions
from imageserver.images.sessions import Need
from tests.unit.fakes import DEATHS, DISK, FILE_TRANSFER, TRANSFER, World, a_request

SHARING = [
    pytest.param(sessions.WRITE, id="write"),
    pytest.param(sessions.ZERO, id="zero"),
    pytest.param(sessions.FLUSH, id="flush"),
]
ALONE = [
    pytest.param(sessions.REPLACE, id="replace"),
    pytest.param(sessions.EXTENTS, id="extents"),
    pytest.param(sessions.DIRTY_EXTENTS, id="dirty-extents"),
]


@pytest.mark.parametrize("stamp", ["first", None])
@pytest.mark.parametrize("need", SHARING)
def test_who_shares_has_the_lock_only_until_its_slot_shows_it(
    need: Need, stamp: str | None
) -> None:
    world = World(others={"write", "zero", "flush"}, stamp=stamp)

    world.sessions(shares_lock=True).open(TRANSFER, need, a_request()).close()

    assert world.journal == [
        *("lock briefly", f"slot {need.kind.name}", "unlock", f"open {need.intent.name}"),
        *("close", "free"),
    ]


@pytest.mark.parametrize("need", SHARING)
def test_who_shares_needs_no_lock_where_nobody_has_died_since_it_was_had(need: Need) -> None:
    world = World(others={"write"}, settled_at={DISK: DEATHS.count})

    session = world.sessions(shares_lock=True).open(TRANSFER, need, a_request())

    assert session.shared
    session.close()
    assert world.journal == [f"slot {need.kind.name}", f"open {need.intent.name}", "close", "free"]


#: The lock is not held while a back end is waited for: others who share wait for it, for seconds.
SETTLED = ["unlock", "settle", "lock briefly", "unlock"]


@pytest.mark.parametrize("need", SHARING)
def test_who_shares_takes_the_lock_first_where_somebody_has_died_since(need: Need) -> None:
    world = World(others={"write"}, settled_at={DISK: DEATHS.count - 1}, abandoned=True)
    slot = f"slot {need.kind.name}"

    world.sessions(shares_lock=True).open(TRANSFER, need, a_request())

    taken = [slot, "free", "lock briefly", slot]
    assert world.journal == [*taken, *SETTLED, f"open {need.intent.name}"]


def test_who_shares_without_the_lock_is_refused_by_who_has_the_image_alone() -> None:
    world = World(others={"replace"}, settled_at={DISK: DEATHS.count})

    with pytest.raises(ImageBusy):
        world.sessions(shares_lock=True).open(TRANSFER, sessions.WRITE, a_request())
    assert world.journal == ["slot WRITE"]


@pytest.mark.parametrize("need", SHARING)
@pytest.mark.parametrize("operation", ["replace", "extents"])
def test_who_shares_is_refused_by_who_has_the_image_alone(need: Need, operation: str) -> None:
    world = World(others={"write", operation})

    with pytest.raises(ImageBusy):
        world.sessions(shares_lock=True).open(TRANSFER, need, a_request())
    assert world.journal == ["lock briefly", f"slot {need.kind.name}", "unlock"]


@pytest.mark.parametrize("need", ALONE)
@pytest.mark.parametrize("operation", ["write", "zero", "flush"])
def test_who_wants_the_image_alone_is_refused_while_others_share_it(
    need: Need, operation: str
) -> None:
    world = World(others={operation})

    with pytest.raises(ImageBusy):
        world.sessions(shares_lock=True).open(TRANSFER, need, a_request())
    assert world.journal == ["lock", f"slot {need.kind.name} alone", "unlock"]


@pytest.mark.parametrize("need", ALONE)
def test_who_has_the_image_alone_keeps_the_lock(need: Need) -> None:
    world = World()

    world.sessions(shares_lock=True).open(TRANSFER, need, a_request()).close()

    assert (world.journal[0], world.journal[-1]) == ("lock", "unlock")


ONE_WRITER = ImageInfo(10, read_only=False, can_zero=True, can_flush=True)


def _alone(need: Need) -> list[str]:
    """Return what is done for an operation that has the image alone."""
    opened = [f"slot {need.kind.name} alone", f"open {need.intent.name}"]
    return ["lock", *opened, "close", "free", "unlock"]


@pytest.mark.parametrize("need", SHARING)
def test_an_export_without_multi_conn_is_given_back_unwritten_and_taken_alone(need: Need) -> None:
    world = World(info=ONE_WRITER)
    opened = f"open {need.intent.name}"

    session = world.sessions(shares_lock=True).open(TRANSFER, need, a_request())

    assert not session.shared
    assert world.locked == [DISK, DISK]
    assert world.journal == [
        *("lock briefly", f"slot {need.kind.name}", "unlock", opened, "close", "free"),
        *("lock briefly", f"slot {need.kind.name} alone", opened),
    ]
    session.close()
    assert world.journal[-3:] == ["close", "free", "unlock"]


@pytest.mark.parametrize("need", SHARING)
def test_an_export_known_to_lack_multi_conn_is_taken_alone_at_once(need: Need) -> None:
    world = World(info=ONE_WRITER)
    sessions_ = world.sessions(shares_lock=True)
    sessions_.open(TRANSFER, sessions.WRITE, a_request()).close()
    world.journal.clear()

    sessions_.open(TRANSFER, need, a_request()).close()

    assert world.journal == _alone(need)


def test_who_found_no_multi_conn_is_refused_while_another_is_there() -> None:
    world = World(info=ONE_WRITER)
    world.on_open = lambda: world.others.add("write")

    with pytest.raises(ImageBusy):
        world.sessions(shares_lock=True).open(TRANSFER, sessions.WRITE, a_request())
    assert world.journal[-4:] == ["free", "lock briefly", "slot WRITE alone", "unlock"]


def test_another_server_at_the_socket_is_asked_anew() -> None:
    world = World(info=ONE_WRITER)
    sessions_ = world.sessions(shares_lock=True)
    sessions_.open(TRANSFER, sessions.WRITE, a_request()).close()
    world.info, world.stamp = None, "another"
    world.journal.clear()

    assert sessions_.open(TRANSFER, sessions.WRITE, a_request()).shared
    assert world.journal[0] == "lock briefly"


def test_who_has_an_export_alone_and_finds_multi_conn_lets_others_in() -> None:
    world = World(info=ONE_WRITER)
    sessions_ = world.sessions(shares_lock=True)
    sessions_.open(TRANSFER, sessions.WRITE, a_request()).close()
    world.info = None
    world.journal.clear()

    assert sessions_.open(TRANSFER, sessions.WRITE, a_request()).shared
    assert world.journal == ["lock", "slot WRITE alone", "open WRITE", "share", "unlock"]
    assert sessions_.open(TRANSFER, sessions.WRITE, a_request()).shared
    assert world.journal[5:] == ["lock briefly", "slot WRITE", "unlock", "open WRITE"]


def test_of_two_that_find_multi_conn_one_after_the_other_each_lets_others_in() -> None:
    world = World(info=ONE_WRITER)
    sessions_ = world.sessions(shares_lock=True)
    sessions_.open(TRANSFER, sessions.WRITE, a_request()).close()
    world.info = None

    def overtake() -> None:
        world.on_lock = lambda: None
        sessions_.open(TRANSFER, sessions.WRITE, a_request()).close()

    world.on_lock = overtake

    assert sessions_.open(TRANSFER, sessions.WRITE, a_request()).shared


def test_what_is_remembered_of_exports_is_forgotten_where_they_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "_MOST_SINGLE", 2)
    world = World(info=ONE_WRITER)
    sessions_ = world.sessions(shares_lock=True)
    for export in ("a", "b", "b", "c", "b"):
        transfer = Transfer("t1", NbdImage("/run/disk.sock", export))
        sessions_.open(transfer, sessions.WRITE, a_request()).close()

    asked_anew = world.journal.count("slot WRITE")
    assert (asked_anew, len(sessions_._single)) == (4, 2)


def test_a_request_to_an_export_without_multi_conn_leaves_once() -> None:
    world = World(info=ONE_WRITER)
    leaves: list[int] = []
    request = a_request()
    request.found(TRANSFER, lambda: leaves.append(len(world.journal)))

    world.sessions(shares_lock=True).open(TRANSFER, sessions.WRITE, request).close()

    assert leaves == [len(world.journal)]


@pytest.mark.parametrize("need", SHARING)
def test_files_have_one_writer_however_many_are_allowed(need: Need) -> None:
    world = World()

    world.sessions(shares_lock=True).open(FILE_TRANSFER, need, a_request()).close()

    assert (world.journal[0], world.journal[-1]) == ("lock", "unlock")


def test_what_a_dead_sharer_left_is_settled_before_the_next_is_let_in() -> None:
    world = World(abandoned=True)

    world.sessions(shares_lock=True).open(TRANSFER, sessions.WRITE, a_request())

    assert world.journal == ["lock briefly", "slot WRITE", *SETTLED, "open WRITE"]


@pytest.mark.parametrize("shares_lock", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("image", [NbdImage, FileImage])
def test_what_is_opened_is_the_image_that_was_locked_wherever_links_lead_meanwhile(
    tmp_path: Path, image: type[NbdImage | FileImage], shares_lock: bool
) -> None:
    link = tmp_path / "link"
    link.symlink_to("first")
    world = World(abandoned=True)

    def move() -> None:
        link.unlink()
        link.symlink_to("second")

    world.on_lock = move
    sessions_ = world.sessions(shares_lock=shares_lock)
    sessions_.open(Transfer("t1", image(str(link))), sessions.WRITE, a_request()).close()

    first = f"{tmp_path}/first".encode()
    used = [*world.locked, *world.images]
    assert {found.identity()[0] for found in used} == {first}
    assert world.images[0] == image(str(link))
