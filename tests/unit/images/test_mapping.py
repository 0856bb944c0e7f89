# SPDX-License-Identifier: Apache-2.0
"""The map for operators: what it shows, and how soon it is out of everybody's way."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.errors import BackendError, ClientGone
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Intent
from imageserver.core.recent import CELLS
from imageserver.core.transfer import Transfer
from imageserver.images.mapping import CONNECT_SECONDS, MAP_SECONDS, Mapper, NoMap
from tests.unit.fakes import FILE_TRANSFER, TRANSFER

MIB = 1 << 20
SIZE = CELLS * MIB
INFO = ImageInfo(size=SIZE, read_only=False, can_zero=True, can_flush=True, multi_conn=True)
MARKED = Transfer("t2", NbdImage("/run/disk.sock", "vda", "b0"))


class World:
    """An image's server, those who use the image, and a clock."""

    def __init__(self, *, has_room_for_many: bool = True) -> None:
        self.now = 0.0
        self.users = [{1}]
        self.opened: list[tuple[Intent, str]] = []
        self.closed = 0
        self.connect_seconds = 0.0
        self.fail: Exception | None = None
        self.bitmap: str | None = None
        self.info = replace(INFO, multi_conn=has_room_for_many)
        self.batches = [[(0, 3 * MIB, False, False)], [(3 * MIB, SIZE - 3 * MIB, True, True)]]
        self.seconds_of_batch = 0.0
        self.mapper = Mapper(self, lambda *_: self.users[-1], lambda: self.now)  # type: ignore[arg-type]

    def open(self, _image: object, intent: Intent, check: Any, transfer: Any = None) -> Any:
        self.opened.append((intent, transfer))
        self.now += self.connect_seconds
        check()
        if self.fail:
            raise self.fail
        return SimpleNamespace(
            size=SIZE, info=self.info, dirty_bitmap=self.bitmap, tells_holes=True,
            extents=self._extents, close=self._close,
        )  # fmt: skip

    def _extents(self, _start: int, _stop: int, *, dirty: bool) -> Iterator[Any]:
        self.dirty = dirty
        for batch in self.batches:
            self.now += self.seconds_of_batch
            yield batch

    def _close(self) -> None:
        self.closed += 1

    def refused(self, transfer: Transfer = TRANSFER) -> str:
        with pytest.raises(NoMap) as told:
            self.mapper.picture(transfer)
        return str(told.value)


def test_an_image_is_drawn_over_a_connection_that_nobody_keeps():
    world = World()
    picture = world.mapper.picture(TRANSFER)
    assert picture.canvas.totals() == (3 * MIB, 0, 0, SIZE - 3 * MIB)
    assert picture.flag == "hole"
    assert (world.opened, world.closed) == ([(Intent.EXTENTS, None)], 1)


@pytest.mark.parametrize(("bitmap", "flag"), [("b0", "dirty"), (None, "hole")])
def test_of_a_transfer_with_a_bitmap_it_shows_what_is_dirty_where_the_server_knows(bitmap, flag):
    world = World()
    world.bitmap = bitmap
    assert world.mapper.picture(MARKED).flag == flag
    assert (world.opened, world.dirty) == ([(Intent.DIRTY_EXTENTS, None)], flag == "dirty")


def test_a_server_with_no_room_is_left_soon():
    world = World()
    world.connect_seconds = CONNECT_SECONDS + 0.01
    assert "no room" in world.refused()


@pytest.mark.parametrize("many", [True, False])
def test_who_begins_with_the_image_has_the_servers_only_place_at_once(many):
    world = World(has_room_for_many=many)
    batches = world.batches

    def begin() -> Iterator[Any]:
        world.users.append({1, 2})
        yield from batches

    world._extents = lambda *_, **__: begin()  # type: ignore[method-assign]
    if many:
        assert world.mapper.picture(TRANSFER).canvas.totals()[0] == 3 * MIB
    else:
        assert "no room" in world.refused()
    assert world.closed == 1


def test_an_image_of_too_many_extents_is_given_up():
    world = World()
    world.seconds_of_batch = MAP_SECONDS + 0.01
    assert "no time" in world.refused()
    assert world.closed == 1


def test_what_goes_wrong_is_told_without_a_path():
    world = World()
    world.fail = BackendError("/run/disk.sock: no such file")
    assert world.refused() == "the image cannot be asked now; the log says why"
    world.fail = ClientGone()
    assert "no room" in world.refused()
    assert world.refused(FILE_TRANSFER) == "images of this kind have no map"


def test_one_at_a_time():
    world = World()
    told: list[str] = []
    world._close = lambda: told.append(world.refused())  # type: ignore[method-assign]
    world.mapper.picture(TRANSFER)
    assert told == ["another map is being drawn"]
    world._close = lambda: None  # type: ignore[method-assign]
    world.mapper.picture(TRANSFER)
