# SPDX-License-Identifier: Apache-2.0
"""Exports of servers that say what no real one does: an error in words, or the right bytes."""

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import pytest
from lab.processes import wait_until

from imageserver.backends.nbd import exports
from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.errors import BackendError, ClientGone, Exhausted
from imageserver.core.extents import Extent
from imageserver.core.ports import Backend, Check, Intent, no_client
from tests.unit.backends.opened import SLOW, exports_of
from tests.unit.nbd_liar import (
    CAN_FLUSH,
    DISCONNECT,
    HAS_FLAGS,
    STATUS,
    Liar,
    lying,
)
from tests.unit.shortages import no_descriptors


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    with lying(Liar(tmp_path / "nbd")) as liar:
        yield liar


def _open(liar: Liar, intent: Intent = Intent.READ, check: Check = no_client) -> Backend:
    return exports_of().open(NbdImage(str(liar.path)), intent, check)


def _extents(liar: Liar, start: int, stop: int) -> list[Extent]:
    backend = _open(liar, Intent.EXTENTS)
    try:
        return list(chain.from_iterable(backend.extents(start, stop, dirty=False)))
    finally:
        backend.close()


@pytest.mark.parametrize("size", [1 << 63, (1 << 63) + 5, (1 << 64) - 1], ids=hex)
@pytest.mark.parametrize("intent", [Intent.INSPECT, Intent.READ, Intent.WRITE])
def test_a_size_that_no_offset_reaches_is_an_error(liar: Liar, size: int, intent: Intent) -> None:
    liar.size = size

    with pytest.raises(BackendError, match=r"announces a size of 2\^63 bytes or more") as refused:
        _open(liar, intent)
    # Whoever keeps the error keeps no place at the server.
    wait_until(lambda: not any(t.name.startswith("client ") for t in threading.enumerate()))
    assert refused.value


def test_a_connection_that_finds_no_descriptor_is_no_failure_of_the_server(liar: Liar) -> None:
    with no_descriptors(), pytest.raises(Exhausted):
        _open(liar)
    _open(liar).close()


def test_the_largest_size_is_served(liar: Liar) -> None:
    liar.size = (1 << 63) - 1
    backend = _open(liar)

    assert b"".join(map(bytes, backend.read(liar.size - 5, 5))) == b"DDDDD"
    backend.close()


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param((0, 4096, 1 << 20), id="minimum-0"),
        pytest.param((3, 4096, 1 << 20), id="minimum-no-power-of-2"),
        pytest.param((4096, 4096, 512), id="maximum-below-minimum"),
        pytest.param((1 << 31, 1 << 31, 1 << 31), id="minimum-2-gib"),
        pytest.param((512, 4096, 1000), id="maximum-no-multiple"),
        pytest.param((512, 4096, 0), id="maximum-0"),
    ],
)
def test_block_sizes_without_sense_count_as_none(liar: Liar, blocks: tuple[int, int, int]) -> None:
    # libnbd drops what the protocol does not allow: no buffer is made as large as that.
    liar.blocks = blocks
    backend = _open(liar)

    assert backend.align == 1
    assert b"".join(map(bytes, backend.read(5, 100))) == b"D" * 100
    backend.close()


@pytest.mark.parametrize("span", [(5, 105), (4091, 4101), (8192, 8193), (4095, 9000)], ids=str)
def test_block_status_is_asked_for_in_whole_blocks_and_cut(
    liar: Liar, span: tuple[int, int]
) -> None:
    liar.blocks = 4096, 4096, 1 << 20
    liar.status = lambda offset, length: [
        (4096, int(at // 4096 % 2)) for at in range(offset, offset + length, 4096)
    ]
    start, stop = span

    found = _extents(liar, start, stop)

    cuts = sorted({start, stop, *range(-(-start // 4096) * 4096, stop, 4096)})
    wanted = [(a, b - a, a // 4096 % 2 == 1, False) for a, b in pairwise(cuts)]
    assert found == wanted
    asked = [(offset, length) for _, command, offset, length in liar.got if command == STATUS]
    assert [request for request in asked if request[0] % 4096 or request[1] % 4096] == []
    assert asked != []


def test_a_status_that_ends_inside_a_block_is_taken_up_from_that_blocks_beginning(
    liar: Liar,
) -> None:
    liar.blocks = 4096, 4096, 1 << 20
    liar.size = 8192
    replies = iter([[(5000, 1)], [(1000, 1), (3096, 0)]])
    liar.status = lambda _offset, _length: next(replies)

    assert _extents(liar, 0, 8192) == [(0, 5096, True, False), (5096, 3096, False, False)]
    assert [at for _, command, at, _ in liar.got if command == STATUS] == [0, 4096]


@pytest.mark.parametrize(
    "pairs",
    [pytest.param([(0, 0)], id="length-0"), pytest.param([(0, 0), (0, 1)], id="lengths-0")],
)
def test_a_status_of_no_bytes_is_an_error_not_a_loop(
    liar: Liar, pairs: list[tuple[int, int]]
) -> None:
    liar.status = lambda _offset, _length: pairs

    with pytest.raises(BackendError):
        _extents(liar, 0, liar.size)


@pytest.mark.parametrize("more", [[], [(1 << 31, 0)]], ids=["alone", "and more"])
def test_a_status_beyond_the_image_is_cut_to_it_or_an_error(
    liar: Liar, more: list[tuple[int, int]]
) -> None:
    """An error where libnbd refuses such an answer (1.22 does, 1.14 does not)."""
    liar.status = lambda _offset, _length: [(1 << 31, 3), *more]

    try:
        found = _extents(liar, 0, liar.size)
    except BackendError as exc:
        assert "EPROTO" in str(exc)  # noqa: PT017 - or no error
    else:
        assert found == [(0, liar.size, True, False)]


# Clients that go away while the server takes its time


@pytest.mark.parametrize("can_zero", [True, False], ids=["write-zeroes", "no-write-zeroes"])
@pytest.mark.parametrize("work", SLOW.values(), ids=SLOW)
def test_a_client_that_has_gone_ends_what_waits_and_leaves_no_write_in_flight(
    liar: Liar, work: Callable[[Backend], object], can_zero: bool
) -> None:
    is_open, goes_on = threading.Event(), threading.Event()

    def check() -> None:
        if is_open.is_set():
            goes_on.set()  # so that what is in flight can be settled
            raise ClientGone

    liar.before = lambda command: command == DISCONNECT or goes_on.wait(10)
    liar.flags = liar.flags if can_zero else HAS_FLAGS | CAN_FLUSH
    backend = _open(liar, Intent.EXTENTS, check)
    is_open.set()

    with pytest.raises(ClientGone):
        work(backend)
    backend.close()
    assert backend.settled
    # What is in flight at most, of 16 chunks; and the good-bye.
    assert 1 <= sum(command != DISCONNECT for _, command, *_ in liar.got) <= 4


def test_a_quick_request_is_over_before_its_client_is_looked_at(liar: Liar) -> None:
    def check() -> None:
        raise AssertionError

    backend = _open(liar, check=check)
    assert len(list(backend.read(0, 10))) == 1
    backend.close()


def test_a_client_that_has_gone_ends_the_handshake(tmp_path: Path) -> None:
    def check() -> None:
        raise ClientGone

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "silent"))
        listener.listen()
        with pytest.raises(ClientGone):
            _open(Liar(tmp_path / "silent"), check=check)


# Links to a server's socket


def _link(link: Path, target: Path) -> NbdImage:
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    return NbdImage(str(link))


def _served(image: NbdImage) -> bytes:
    backend = exports_of().open(image, Intent.WRITE)
    try:
        return b"".join(map(bytes, backend.read(0, 2)))
    finally:
        backend.close()


def test_a_pinned_image_stays_at_its_socket_when_the_link_to_it_is_moved(
    liar: Liar, tmp_path: Path
) -> None:
    image = _link(tmp_path / "link", liar.path)
    pinned = image.pinned()
    _link(tmp_path / "link", tmp_path / "another")

    assert pinned == image
    assert image.stamp() is None
    assert pinned.stamp() == NbdImage(str(liar.path)).stamp()
    assert _served(pinned) == b"DD"
    with pytest.raises(BackendError, match=r"^.*/link export '': .*No such file"):
        _served(image)


@pytest.mark.parametrize(
    ("error", "cls", "said"),
    [
        (PermissionError(errno.EPERM, "Not permitted"), BackendError, "sock_diag.*AF_NETLINK"),
        (OSError(errno.EMFILE, "Too many"), Exhausted, "connect: Too many"),
        (FileNotFoundError(errno.ENOENT, "None", "/s"), BackendError, "connect: None .ENOENT"),
    ],
    ids=["netlink", "descriptors", "socket"],
)
def test_where_orphans_cannot_be_told_the_log_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, error: OSError, cls: type[Exception], said: str
) -> None:
    def refused(*_: object) -> bool:
        raise error

    monkeypatch.setattr(exports, "has_orphans", refused)
    with pytest.raises(cls, match=f"^/s export '': .*{said}"):
        exports_of().settle(NbdImage("/s"))


@pytest.mark.parametrize("what", ["socket", "directory"])
def test_a_pinned_image_is_not_followed_where_its_place_has_become_a_link(
    liar: Liar, tmp_path: Path, what: str
) -> None:
    """Its lock is of the place where it was pinned: another image would be written unlocked."""
    place = tmp_path / "d" / "s"
    place.parent.mkdir()
    with lying(Liar(place)) as first:
        pinned = NbdImage(str(place)).pinned()
        assert _served(pinned) == b"DD"
        if what == "socket":
            place.rename(tmp_path / "old")
            place.symlink_to(liar.path)
        else:
            (tmp_path / "d").rename(tmp_path / "e")
            (tmp_path / "d").symlink_to("e")
        before = len(liar.got), len(first.got)
        with pytest.raises(BackendError, match="/d/s has been moved, or links to it lead else"):
            _served(pinned)
        assert (len(liar.got), len(first.got)) == before


def test_a_link_may_lead_to_a_path_longer_than_an_address_takes(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    (tmp_path / "short").symlink_to(deep)
    with lying(Liar(tmp_path / "short" / "nbd")) as liar:
        image = _link(tmp_path / "link", deep / "nbd").pinned()
        assert len(image.path) > 107
        assert _served(image) == b"DD"
        with no_descriptors(), pytest.raises(Exhausted):
            _served(image)
        liar.path.unlink()
        with pytest.raises(BackendError, match=r"/link export '': connect: No such .* \(ENOENT\)$"):
            _served(image)
