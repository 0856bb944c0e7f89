# SPDX-License-Identifier: Apache-2.0
"""One connection over a fake libnbd and a clock that is set: what is waited for, and how long."""

import errno
from collections.abc import Callable

import nbd
import pytest

from imageserver.backends.nbd import busypoll, connection, link
from imageserver.backends.nbd.connection import DISCONNECT_SECONDS, Connection, Tuning, close_all
from imageserver.backends.nbd.failures import NotSupported, Stopped, TryAgain, translated
from imageserver.backends.nbd.link import Link
from imageserver.core.errors import (
    BackendError,
    BackendTimeout,
    ClientGone,
    Exhausted,
    NoSpace,
)

TIMEOUT = 5.0
KIB = 1024
NEVER = 1e9


class _Handle:
    """What libnbd's handle is asked here; requests are complete, and the server gone, at a time."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.completes = NEVER
        self.closes = NEVER
        self.error: nbd.Error | None = None
        self.is_dead = False
        self.size = 1 << 20
        self.blocks = {nbd.SIZE_MINIMUM: 0, nbd.SIZE_MAXIMUM: 0}
        self.has_said_goodbye = False

    def monotonic(self) -> float:
        return self.seconds

    def get_size(self) -> int:
        return self.size

    def get_block_size(self, which: int) -> int:
        return self.blocks[which]

    def aio_pwrite(self, _buffer: object, _offset: int) -> int:
        return 1

    def aio_pread(self, _buffer: object, _offset: int) -> int:
        return 2

    def aio_command_completed(self, _cookie: int) -> bool:
        is_complete = self.seconds >= self.completes
        if is_complete and self.error:
            raise self.error
        return is_complete

    def aio_in_flight(self) -> int:
        # As libnbd does: what a dead connection had in flight is no more.
        return int(self.seconds < self.completes and not self.is_dead)

    def poll(self, milliseconds: int) -> int:
        if self.error and self.completes == NEVER:
            self.is_dead = True
            raise self.error
        self.seconds += milliseconds / 1000
        return int(milliseconds > 0)

    def aio_disconnect(self) -> None:
        if self.error:
            raise self.error
        self.has_said_goodbye = True

    def aio_is_closed(self) -> bool:
        return self.seconds >= self.closes

    def aio_is_dead(self) -> bool:
        return self.is_dead


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> _Handle:
    made = _Handle()
    monkeypatch.setattr(link, "time", made)
    monkeypatch.setattr(connection, "time", made)
    # No time passes while a thread looks: here it sleeps.
    monkeypatch.setattr(busypoll, "_SPIN_SECONDS", -1.0)
    monkeypatch.setattr(link, "_in_use", set())
    monkeypatch.setattr(Link, "_met_at", 0.0)
    return made


def _link(
    handle: _Handle, check: Callable[[], None] = lambda: None, chunk_size: int = 64 * KIB
) -> Link:
    return Link(Connection(handle, "export", (1,), Tuning(chunk_size, 3, TIMEOUT)), check)


def _writing(handle: _Handle, check: Callable[[], None] = lambda: None) -> Link:
    link = _link(handle, check)
    link.pwrite(memoryview(bytearray(1)), 0)
    return link


@pytest.mark.parametrize(
    ("minimum", "maximum", "chunk_size", "found"),
    [
        pytest.param(0, 0, 64 * KIB, (1, 64 * KIB, 32 << 20), id="server-says-nothing"),
        pytest.param(512, 4096, 64 * KIB, (512, 4096, 4096), id="server-takes-less"),
        pytest.param(512, 5000, 64 * KIB, (512, 4608, 5000), id="whole-blocks"),
        pytest.param(65536, 65536, 4096, (65536, 65536, 65536), id="a-block-at-least"),
    ],
)
def test_a_request_is_of_whole_blocks_and_as_large_as_configured_or_taken(
    handle: _Handle, minimum: int, maximum: int, chunk_size: int, found: tuple[int, int, int]
) -> None:
    handle.blocks = {nbd.SIZE_MINIMUM: minimum, nbd.SIZE_MAXIMUM: maximum}
    link = _link(handle, chunk_size=chunk_size)
    assert (link.align, link.chunk, link.maximum) == found


def test_a_request_is_alone_where_none_has_met_another_for_a_moment(handle: _Handle) -> None:
    first = _link(handle)
    second = _link(handle)
    second.let_go()
    handle.seconds += 0.04
    third = _link(handle)
    first.let_go()
    third.let_go()
    third.let_go()
    handle.seconds += 0.04
    fourth = _link(handle)
    fourth.let_go()
    handle.seconds += 0.06
    links = [first, second, third, fourth, _link(handle)]
    assert [each.is_alone for each in links] == [True, False, False, False, True]


@pytest.mark.parametrize("others", ["none", "before", "since", "gone"])
def test_a_request_that_is_alone_is_looked_at_without_sleeping(
    handle: _Handle, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    looks: list[int] = []
    monkeypatch.setattr(
        busypoll.BusyPoll, "wait", lambda _self, poll, longest: looks.append(poll(longest))
    )
    before = _link(handle) if others == "before" else None
    link = _link(handle)
    since = _link(handle) if others in {"since", "gone"} else None
    if since and others == "gone":
        since.let_go()
    handle.completes = handle.seconds + 0.1

    link.wait(1)

    assert looks == [1] * (others in {"none", "gone"})
    del before, since


def test_a_request_is_waited_for(handle: _Handle) -> None:
    handle.completes = handle.seconds + TIMEOUT - 1
    _link(handle).wait(1)
    assert handle.seconds == pytest.approx(handle.completes, abs=0.11)


def test_a_server_that_completes_nothing_is_given_up_after_the_timeout(handle: _Handle) -> None:
    link = _writing(handle)
    with pytest.raises(BackendTimeout, match="export: completed nothing in 5 s"):
        link.wait(1)
    assert handle.seconds == pytest.approx(1000 + TIMEOUT, abs=0.01)

    link.settle()
    with pytest.raises(Stopped):
        link.wait(1)
    link.close()
    assert handle.seconds == pytest.approx(1000 + TIMEOUT, abs=0.01)  # that was the only wait
    assert (link.settled, handle.has_said_goodbye) == (False, False)


def test_a_client_is_looked_at_ten_times_a_second_but_not_at_once(handle: _Handle) -> None:
    looks: list[float] = []
    handle.completes = handle.seconds + 1.05
    _link(handle, lambda: looks.append(handle.seconds)).wait(1)

    assert looks == pytest.approx([1000 + tenth / 10 for tenth in range(1, 11)], abs=0.02)


def test_a_client_that_has_gone_ends_the_wait_and_writes_are_settled(handle: _Handle) -> None:
    def check() -> None:
        raise ClientGone

    handle.completes = handle.seconds + 2
    link = _writing(handle, check)
    with pytest.raises(ClientGone):
        link.wait(1)
    assert (handle.seconds, link.settled) == (pytest.approx(1000.1, abs=0.01), False)

    link.settle()
    assert (handle.seconds, link.settled) == (pytest.approx(1002, abs=0.11), True)


def test_who_gives_the_server_up_is_not_kept_waiting(handle: _Handle) -> None:
    link = _writing(handle)
    with link.stopped(), pytest.raises(Stopped):
        link.wait(1)
    handle.completes = handle.seconds
    link.wait(1)  # that was for a moment
    handle.completes = NEVER

    link.stop()
    with pytest.raises(Stopped):
        link.wait(1)
    link.settle()
    link.close()
    assert (handle.seconds, link.settled, handle.has_said_goodbye) == (1000, False, False)


@pytest.mark.parametrize("what", ["silent", "dies", "is dead", "has hung up"])
def test_writes_that_may_still_land_leave_the_link_unsettled(handle: _Handle, what: str) -> None:
    link = _writing(handle)
    if what != "silent":
        handle.error = nbd.Error("broken", errno.EPIPE)
    if what == "is dead":
        with pytest.raises(BackendError):
            link.wait(1)
    elif what == "has hung up":
        handle.completes = handle.closes = handle.seconds
    link.settle()

    assert not link.settled
    assert handle.seconds <= 1000 + TIMEOUT + 0.01


def test_a_good_bye_is_waited_for_but_not_long(handle: _Handle) -> None:
    handle.closes = handle.seconds + 0.3
    link = _link(handle)
    link.close()
    link.close()
    assert handle.has_said_goodbye
    assert handle.seconds <= 1000 + DISCONNECT_SECONDS + 0.01

    handle.closes = NEVER
    began = handle.seconds
    _link(handle).close()
    assert handle.seconds == pytest.approx(began + DISCONNECT_SECONDS, abs=0.01)


def test_several_good_byes_are_waited_for_together(handle: _Handle) -> None:
    close_all(_link(handle).let_go() for _ in range(3))
    assert handle.seconds == pytest.approx(1000 + DISCONNECT_SECONDS, abs=0.01)


def test_a_request_may_follow_one_that_left_nothing_under_way(handle: _Handle) -> None:
    handle.completes = handle.seconds
    link = _link(handle)
    link.wait(link.pread(memoryview(bytearray(1)), 0))
    assert link.is_clean
    link.wait(link.pwrite(memoryview(bytearray(1)), 0))
    assert not link.is_clean  # of a write, its transfer says when it is done
    link.settled = True
    assert link.is_clean


@pytest.mark.parametrize("spoil", ["in flight", "failed", "stopped"])
def test_no_request_follows_one_that_was_given_up_or_has_failed(
    handle: _Handle, spoil: str
) -> None:
    link = _link(handle)
    cookie = link.pread(memoryview(bytearray(1)), 0)
    if spoil == "failed":
        handle.completes, handle.error = 0, nbd.Error("bad", errno.EIO)
        with pytest.raises(BackendError):
            link.wait(cookie)
    elif spoil == "stopped":
        handle.completes = 0
        link.wait(cookie)
        link.stop()
    assert not link.is_clean


def test_an_answer_that_declines_is_no_failure(handle: _Handle) -> None:
    handle.completes, handle.error = 0, nbd.Error("no", errno.EOPNOTSUPP)
    link = _link(handle)
    with pytest.raises(NotSupported):
        link.wait(link.pread(memoryview(bytearray(1)), 0))
    assert link.is_clean


def test_who_stops_a_request_that_is_over_does_not_meet_the_next_one(handle: _Handle) -> None:
    first = _link(handle)
    connection = first.let_go()
    second = Link(connection)
    first.stop()

    handle.completes = handle.seconds + 1
    second.wait(second.pread(memoryview(bytearray(1)), 0))
    assert second.is_clean


def test_a_broken_connection_is_closed_without_a_word(handle: _Handle) -> None:
    handle.error = nbd.Error("broken", errno.EPIPE)
    _link(handle).close()
    assert (handle.seconds, handle.has_said_goodbye) == (1000, False)


@pytest.mark.parametrize(
    ("number", "cls"),
    [
        (errno.ENOSPC, NoSpace),
        (errno.EDQUOT, NoSpace),
        (errno.EOPNOTSUPP, NotSupported),
        (errno.ETIMEDOUT, BackendTimeout),
        (errno.EAGAIN, TryAgain),
        (errno.EMFILE, Exhausted),
        (errno.ENFILE, Exhausted),
        *((number, BackendError) for number in (errno.EIO, errno.EPERM, errno.EROFS)),
        *((number, BackendError) for number in (errno.EINVAL, errno.ENOMEM, 0)),
    ],
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_each_failure_of_a_server_is_one_of_ours(
    handle: _Handle, number: int, cls: type[Exception]
) -> None:
    handle.error = nbd.Error("as told", number)
    handle.completes = 0
    with pytest.raises(cls) as raised:
        _link(handle).wait(1)

    assert type(raised.value) is cls
    assert str(raised.value).startswith("export: ")
    assert type(translated(handle.error, "export")) is cls
