# SPDX-License-Identifier: Apache-2.0
"""Sessions over fake ports: taken in order, given back in reverse, whatever fails on the way."""

from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import (
    BackendError,
    BackendTimeout,
    ClientGone,
    FileAccessError,
    ImageBusy,
    NoSlot,
    StateUnavailable,
)
from imageserver.core.kinds import Image
from imageserver.core.ports import Ticket
from imageserver.core.ranges import Span
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer
from imageserver.images import sessions
from imageserver.images.sessions import Need
from tests.unit.fakes import DEATHS, DISK, TRANSFER, World, a_request

CLIENT = "192.0.2.1"
NEEDS = [
    pytest.param(sessions.READ, ["slot READ", "open READ"], id="read"),
    pytest.param(sessions.WRITE, ["lock", "slot WRITE alone", "open WRITE"], id="write"),
    pytest.param(sessions.REPLACE, ["lock", "slot WRITE alone", "open REPLACE"], id="replace"),
    pytest.param(sessions.ZERO, ["lock", "slot WRITE alone", "open WRITE"], id="zero"),
    pytest.param(sessions.FLUSH, ["lock", "slot OTHER alone", "open FLUSH"], id="flush"),
    pytest.param(sessions.EXTENTS, ["lock", "slot OTHER alone", "open EXTENTS"], id="extents"),
    pytest.param(
        sessions.DIRTY_EXTENTS,
        ["lock", "slot OTHER alone", "open DIRTY_EXTENTS"],
        id="dirty-extents",
    ),
]
TOGETHER = "slot READ together"


@pytest.mark.parametrize(
    ("settled_at", "taken"),
    [
        pytest.param({}, ["lock briefly", TOGETHER, "unlock"], id="unsettled"),
        pytest.param({DISK: DEATHS.count}, [TOGETHER], id="settled"),
    ],
)
@pytest.mark.parametrize("need", [sessions.QCOW2, sessions.DIRTY_QCOW2], ids=["qcow2", "dirty"])
def test_who_has_an_image_together_with_others_keeps_its_slot_alone(
    need: Need, settled_at: dict[Image, int], taken: list[str]
) -> None:
    world = World(settled_at=settled_at)
    world.sessions().open(TRANSFER, need, a_request()).close()

    assert world.journal == [*taken, f"open {need.intent.name}", "close", "free"]


@pytest.mark.parametrize(("need", "taken"), NEEDS)
def test_what_an_operation_needs_is_taken_in_order(need: Need, taken: list[str]) -> None:
    world = World()

    world.sessions().open(TRANSFER, need, a_request())

    assert world.journal == taken


@pytest.mark.parametrize(("need", "taken"), NEEDS)
def test_closing_gives_everything_back_in_reverse(need: Need, taken: list[str]) -> None:
    world = World()

    world.sessions().open(TRANSFER, need, a_request()).close()

    given_back = ["close", "free", "unlock"]
    assert world.journal == taken + given_back[: len(taken)]


def test_closing_twice_gives_back_once() -> None:
    world = World()
    session = world.sessions().open(TRANSFER, sessions.WRITE, a_request())

    with session:
        session.close()
    session.close()

    assert world.journal[3:] == ["close", "free", "unlock"]


@pytest.mark.parametrize(
    ("where", "error", "given_back"),
    [
        pytest.param("lock", ImageBusy(), [], id="lock-busy"),
        pytest.param("slot WRITE alone", NoSlot(Kind.WRITE), ["unlock"], id="slots-taken"),
        pytest.param("slot WRITE alone", StateUnavailable(), ["unlock"], id="guard-stuck"),
        pytest.param("open WRITE", BackendError("refused"), ["free", "unlock"], id="refused"),
        pytest.param("open WRITE", BackendTimeout("silent"), ["free", "unlock"], id="silent"),
        pytest.param("open WRITE", FileAccessError("gone"), ["free", "unlock"], id="no-file"),
        pytest.param("open WRITE", KeyboardInterrupt(), ["free", "unlock"], id="interrupted"),
    ],
)
def test_each_failure_gives_back_what_was_taken(
    where: str, error: BaseException, given_back: list[str]
) -> None:
    world = World(fail={where: error})

    with pytest.raises(type(error)) as raised:
        world.sessions().open(TRANSFER, sessions.WRITE, a_request())

    assert raised.value is error
    assert world.journal[world.journal.index(where) + 1 :] == given_back


@pytest.mark.parametrize("shares_lock", [False, True])
def test_the_lock_is_given_back_where_it_cannot_be_told_who_has_the_image(
    shares_lock: bool,
) -> None:
    world = World(fail={"slot WRITE alone": StateUnavailable()})

    with pytest.raises(StateUnavailable):
        world.sessions(shares_lock=shares_lock).open(TRANSFER, sessions.REPLACE, a_request())

    assert world.journal == ["lock", "slot WRITE alone", "unlock"]


@pytest.mark.parametrize("need", [sessions.READ, sessions.ZERO, sessions.EXTENTS])
def test_the_ticket_says_who_does_what(need: Need) -> None:
    world = World()

    world.sessions().open(TRANSFER, need, a_request(CLIENT))

    key = "key" if need.locked else ""
    assert world.tickets == [Ticket("t1", need.operation, key, CLIENT)]
    assert world.transfers == [TRANSFER]
    # Who names no image follows its links only once: when it is opened.
    assert (world.images[0] is TRANSFER.image) is not need.locked


def test_the_account_says_what_was_wanted_and_what_went_wrong_in_the_session() -> None:
    request, failure = a_request(), BackendError("it is gone")

    with (
        pytest.raises(BackendError),
        World().sessions().open(TRANSFER, sessions.EXTENTS, request),
    ):
        raise failure

    assert (request._operation, request.kind, request._error) == ("extents", Kind.OTHER, failure)


def test_a_reader_names_its_image_where_the_readers_of_each_are_counted(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("image")
    world = World()

    opened = world.sessions(counts_readers=True)
    opened.open(Transfer("t1", FileImage(str(link))), sessions.READ, a_request(CLIENT))

    assert world.tickets == [Ticket("t1", "read", "key", CLIENT)]
    assert world.journal == ["slot READ", "open READ"]
    link.unlink()  # what is opened is what was counted, wherever the link leads by then
    assert [found.identity()[0] for found in world.images] == [f"{tmp_path}/image".encode()]


def test_progress_goes_to_the_slot_and_to_the_meter() -> None:
    world = World()

    request = a_request()
    world.sessions().open(TRANSFER, sessions.READ, request)
    request.begin(Span(0, 10, 20))
    request.progress(3)

    assert world.progress == [(0, 10), (3, 10)]
    assert world.metered == [("read", "nbd", 3)]
    assert (request.span, request.done) == (Span(0, 10, 20), 3)


def test_an_abandoned_image_is_settled_under_lock_and_slot_before_it_is_opened() -> None:
    world = World(abandoned=True)

    world.sessions().open(TRANSFER, sessions.WRITE, a_request()).close()

    assert world.journal == [
        *("lock", "slot WRITE alone", "settle", "open WRITE"),
        *("close", "free", "unlock"),
    ]


@pytest.mark.parametrize(
    ("where", "error"),
    [
        pytest.param("slot WRITE alone", NoSlot(Kind.WRITE), id="slots-taken"),
        pytest.param("settle", BackendTimeout("still under way"), id="does-not-settle"),
    ],
)
def test_an_abandoned_image_that_was_not_settled_stays_so(where: str, error: Exception) -> None:
    world = World(abandoned=True, fail={where: error})

    with pytest.raises(type(error)):
        world.sessions().open(TRANSFER, sessions.WRITE, a_request())

    assert world.abandoned
    assert world.journal[-1] == "unlock"


def test_an_abandoned_image_that_was_settled_is_so_even_if_opening_fails() -> None:
    world = World(abandoned=True, fail={"open WRITE": BackendError("refused")})

    with pytest.raises(BackendError):
        world.sessions().open(TRANSFER, sessions.WRITE, a_request())

    assert not world.abandoned
    assert world.journal[-2:] == ["free", "unlock"]


def test_reading_asks_for_no_lock_and_so_waits_for_no_one() -> None:
    world = World(abandoned=True, fail={"lock": ImageBusy(), "settle": BackendTimeout("no")})

    world.sessions().open(TRANSFER, sessions.READ, a_request()).close()

    assert world.journal == ["slot READ", "open READ", "close", "free"]


@pytest.mark.parametrize("shares_lock", [False, True])
def test_a_write_still_under_way_is_told_with_the_slot_before_anybody_gets_in(
    shares_lock: bool,
) -> None:
    world = World(settled=False)

    world.sessions(shares_lock=shares_lock).open(TRANSFER, sessions.WRITE, a_request()).close()

    end = ["close", "free unsettled", "unlock"]
    assert world.journal[-3:] == (["open WRITE", *end[:2]] if shares_lock else end)


def test_what_cannot_be_closed_does_not_keep_slot_and_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World()
    session = world.sessions().open(TRANSFER, sessions.WRITE, a_request())
    monkeypatch.setattr(world.opened[0], "close", lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        session.close()
    assert world.journal[-2:] == ["free", "unlock"]


def test_whether_writes_have_settled_is_asked_after_the_back_end_was_closed() -> None:
    world = World(settled=False)
    session = world.sessions().open(TRANSFER, sessions.WRITE, a_request())

    world.settled = True
    session.close()

    assert world.journal[-1] == "unlock"


@pytest.mark.parametrize("leaves", ["client", "cut"])
def test_a_back_end_is_told_when_nobody_waits_any_more(leaves: str) -> None:
    world, gone = World(), [False]
    request = a_request(is_gone=lambda: gone[0])
    world.sessions().open(TRANSFER, sessions.WRITE, request)
    world.checks[-1]()  # it is there
    if leaves == "cut":
        request.cut()
        assert world.journal[-1] == "stop"
    gone[0] = leaves == "client"

    with pytest.raises(ClientGone):
        world.checks[-1]()


def test_a_request_that_was_cut_before_its_back_end_opened_stops_it() -> None:
    world, request = World(), a_request()
    world.on_open = request.cut

    world.sessions().open(TRANSFER, sessions.WRITE, request)

    assert world.journal[-1] == "stop"


@pytest.mark.parametrize(
    ("where", "error", "noted"),
    [
        pytest.param("lock", ImageBusy(), None, id="before-the-slot"),
        pytest.param("slot WRITE alone", NoSlot(Kind.WRITE), None, id="no-slot"),
        pytest.param("open WRITE", BackendError("refused"), "BackendError: refused", id="open"),
    ],
)
def test_only_what_goes_wrong_with_a_slot_is_an_error_of_the_transfers(
    where: str, error: Exception, noted: str | None
) -> None:
    request, left = a_request(), []
    request.found(TRANSFER, lambda: left.append(request.image_error))

    with pytest.raises(type(error)):
        World(fail={where: error}).sessions().open(TRANSFER, sessions.WRITE, request)
    assert left == [noted]
