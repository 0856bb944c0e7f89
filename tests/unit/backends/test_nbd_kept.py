# SPDX-License-Identifier: Apache-2.0
"""Connections that are kept between requests to a server, and those that must not be."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from imageserver.backends.nbd import connection
from imageserver.backends.nbd.exports import NbdExports
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.nbd.peers import has_orphans
from imageserver.core.errors import BackendError
from imageserver.core.ports import Backend, Intent, no_client
from imageserver.core.transfer import Transfer
from tests.unit.backends.opened import SLOW, WHOLE, exports_of
from tests.unit.nbd_liar import DISCONNECT, MULTI_CONN, Liar, Peer, lying


@pytest.fixture
def liar(tmp_path: Path) -> Iterator[Liar]:
    with lying(Liar(tmp_path / "nbd")) as liar:
        yield liar


@pytest.fixture
def keeping(liar: Liar) -> Iterator[NbdExports]:
    """What keeps connections, with a server that lets it."""
    liar.flags |= MULTI_CONN
    exports = exports_of(idle_seconds=60.0)
    yield exports
    exports.drain()


OPERATIONS: dict[str, tuple[Intent, Callable[[Backend], object]]] = {
    "read": (Intent.READ, SLOW["read"]),
    "write": (Intent.WRITE, SLOW["write"]),
    "zero": (Intent.WRITE, SLOW["zero"]),
    "flush": (Intent.FLUSH, SLOW["flush"]),
    "extents": (Intent.EXTENTS, SLOW["extents"]),
    "dirty extents": (
        Intent.DIRTY_EXTENTS,
        lambda backend: list(backend.extents(0, WHOLE, dirty=True)),
    ),
}


def _open(exports: NbdExports, path: Path, intent: Intent) -> Backend:
    image = NbdImage(str(path))
    return exports.open(image, intent, no_client, Transfer("x", image))


@pytest.mark.parametrize("bitmap", [None, "b"], ids=["no-bitmap", "bitmap"])
def test_one_connection_serves_every_operation(
    liar: Liar, keeping: NbdExports, bitmap: str | None
) -> None:
    image = NbdImage(str(liar.path), bitmap=bitmap)
    for intent, work in OPERATIONS.values():
        backend = keeping.open(image, intent, no_client, Transfer("x", image))
        work(backend)
        backend.close()
        backend.close()

    assert {number for number, *_ in liar.got} == {0}
    bitmaps = [b"qemu:dirty-bitmap:b"] * (bitmap is not None)
    assert liar.contexts == [b"base:allocation", b"qemu:allocation-depth", *bitmaps]


@pytest.mark.parametrize(
    ("flags", "transfer", "idle_seconds"),
    [
        pytest.param(0, "x", 60.0, id="room-for-one"),
        pytest.param(MULTI_CONN, "", 60.0, id="probe"),
        pytest.param(MULTI_CONN, "x", 0.0, id="turned-off"),
    ],
)
def test_where_none_is_kept_each_request_has_a_connection_and_asks_for_what_it_needs(
    liar: Liar, flags: int, transfer: str, idle_seconds: float
) -> None:
    liar.flags |= flags
    exports = exports_of(idle_seconds)
    for _ in range(3):
        image = NbdImage(str(liar.path))
        made_for = Transfer(transfer, image) if transfer else None
        backend = exports.open(image, Intent.READ, no_client, made_for)
        work = liar.contexts.copy()
        list(backend.read(0, 10))
        backend.close()
        liar.contexts.clear()

    assert [(number, command) for number, command, *_ in liar.got if command == DISCONNECT] == [
        (number, DISCONNECT) for number in range(3)
    ]
    assert work == []


def test_a_request_that_fails_leaves_its_connection_to_nobody(
    liar: Liar, keeping: NbdExports
) -> None:
    liar.status = lambda _offset, _length: [(0, 0)]
    image = NbdImage(str(liar.path))
    backend = keeping.open(image, Intent.EXTENTS, no_client, Transfer("x", image))
    with pytest.raises(BackendError):
        SLOW["extents"](backend)
    backend.close()
    again = keeping.open(image, Intent.READ, no_client, Transfer("x", image))
    SLOW["read"](again)
    again.close()

    assert liar.got[-1][:2] in {(0, 0), (1, 0)}


def test_a_reader_that_gives_up_leaves_its_connection_to_nobody(
    liar: Liar, keeping: NbdExports
) -> None:
    goes_on = threading.Event()
    liar.before = lambda _: len(liar.got) <= 2 or goes_on.wait(10)  # a warm-up, a piece
    image = NbdImage(str(liar.path))
    backend = keeping.open(image, Intent.READ, no_client, Transfer("x", image))
    reading = backend.read(0, WHOLE)
    next(reading)
    reading.close()  # the second piece is on its way
    closing = threading.Thread(target=backend.close)
    closing.start()
    goes_on.set()
    closing.join()
    again = keeping.open(image, Intent.READ, no_client, Transfer("x", image))
    list(again.read(0, 10))
    again.close()

    assert liar.got[-1][:2] == (1, 0)


def test_a_request_that_is_cut_late_does_not_cut_the_next_one(
    liar: Liar, keeping: NbdExports
) -> None:
    image = NbdImage(str(liar.path))
    first = keeping.open(image, Intent.READ, no_client, Transfer("x", image))
    first.close()
    second = keeping.open(image, Intent.READ, no_client, Transfer("x", image))
    first.stop()

    assert b"".join(map(bytes, second.read(0, 2))) == b"DD"
    second.close()


def test_a_kept_connection_is_no_orphan(liar: Liar, keeping: NbdExports) -> None:
    _open(keeping, liar.path, Intent.READ).close()
    assert not has_orphans(str(liar.path))


def test_a_connection_that_the_server_has_closed_is_replaced_unseen(
    liar: Liar, keeping: NbdExports
) -> None:
    image = NbdImage(str(liar.path))
    serve = liar.answer

    def answer(peer: Peer, *request: int) -> None:
        serve(peer, *request)
        if len(liar.got) == 1:
            raise OSError  # closes the connection

    liar.answer = answer  # type: ignore[method-assign]
    for _ in range(2):
        backend = keeping.open(image, Intent.READ, no_client, Transfer("x", image))
        assert b"".join(map(bytes, backend.read(0, 2))) == b"DD"
        backend.close()
        for thread in threading.enumerate():
            if thread.name == "client 0":
                thread.join(5)

    assert [number for number, *_ in liar.got] == [0, 1]


def test_what_is_kept_is_of_the_socket_it_is_kept_for_though_a_link_is_moved_to_and_fro(
    liar: Liar, keeping: NbdExports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, connect = tmp_path / "link", connection._connect_unix
    places = [tmp_path / "other"]

    def lead_to(place: Path) -> None:
        link.unlink(missing_ok=True)
        link.symlink_to(place)

    def connect_while_moved(*args: object) -> None:
        lead_to(places.pop() if places else liar.path)
        try:
            connect(*args)  # type: ignore[arg-type]
        finally:
            lead_to(liar.path)

    monkeypatch.setattr(connection, "_connect_unix", connect_while_moved)
    with lying(Liar(tmp_path / "other")) as other:
        other.flags |= MULTI_CONN
        lead_to(liar.path)
        _open(keeping, link, Intent.READ).close()
        backend = _open(keeping, link, Intent.WRITE)
        SLOW["write"](backend)
        backend.close()
        keeping.drain()
    assert not places
    assert [number for number, *_ in liar.got][:1] == [0]
    assert not other.got


def test_a_server_that_has_taken_the_place_of_another_is_told_from_it(
    liar: Liar, tmp_path: Path
) -> None:
    """A checksum opens an image several times: it must not be made of two."""
    exports, image = exports_of(), NbdImage(str(liar.path))

    def opened() -> Backend:
        return exports.open(image, Intent.INSPECT, no_client, Transfer("x", image))

    with lying(Liar(tmp_path / "other")) as other, closing(opened()) as first:
        with closing(opened()) as again:
            assert again.info.identity == first.info.identity
        other.path.rename(liar.path)
        with closing(opened()) as second:
            assert second.info.identity != first.info.identity
