# SPDX-License-Identifier: Apache-2.0
"""Holds of kept connections on their transfers, over real files and those of two processes."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import StateUnavailable, UnknownImage
from imageserver.core.ports import Owned
from imageserver.core.transfer import Transfer
from imageserver.runtime.directory import RuntimeDirectory
from imageserver.runtime.marks import Marks
from imageserver.transfers.holding import Holding
from imageserver.transfers.lookup import Catalogue
from imageserver.transfers.registered import RegistrationFiles
from imageserver.transfers.usage import ActivityFiles

IMAGE, OTHER = FileImage("/image"), FileImage("/other")


@dataclass
class _Files:
    """The control program's files."""

    found: dict[str, Transfer]

    def get(self, transfer_id: str) -> Transfer:
        try:
            return self.found[transfer_id]
        except KeyError:
            raise UnknownImage(transfer_id) from None


class _World:
    def __init__(self, path: Path) -> None:
        for name in ("registered", "activity"):
            (path / name).mkdir(mode=0o700)
        self.usage = ActivityFiles(str(path / "activity"))
        self.registrations = RegistrationFiles(str(path / "registered"), self.usage)
        self.files: dict[str, Transfer] = {"file": Transfer("file", IMAGE)}
        self.is_lost = False
        self.catalogue = Catalogue(
            _Files(self.files), self.registrations, self.usage, require=self.require
        )
        self.holding = Holding(self.catalogue, Marks(RuntimeDirectory(str(path))))
        self.registrations.store(Transfer("x", IMAGE, idle_seconds=60))

    def transfer(self) -> Transfer:
        """The registered transfer, as a request finds it."""
        found = self.catalogue.find("x", visit=False)
        assert found.activity
        found.activity.close()
        return found.transfer

    def require(self) -> None:
        if self.is_lost:
            raise StateUnavailable

    def is_held(self, name: str) -> bool:
        activity = self.usage.find(Owned.REGISTERED, name, visit=False)
        assert activity
        try:
            return activity.is_held()
        finally:
            activity.close()


@pytest.fixture
def world(tmp_path: Path) -> _World:
    return _World(tmp_path)


def test_a_registered_transfer_is_held_until_its_connection_is_closed(world: _World) -> None:
    hold = world.holding.hold(world.transfer())
    assert hold is not None
    seen = [world.is_held("x")]
    hold.close()
    hold.close()
    assert [*seen, world.is_held("x")] == [True, False]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        pytest.param("x", OTHER, id="another-image"),
        pytest.param("none", IMAGE, id="unknown"),
        pytest.param("", IMAGE, id="no-transfer"),
    ],
)
def test_what_does_not_name_the_image_is_not_held(
    world: _World, name: str, image: FileImage
) -> None:
    assert world.holding.hold(Transfer(name, image, idle_seconds=60)) is None
    assert not world.is_held("x")


def test_where_transfers_cannot_be_looked_up_none_is_held(world: _World) -> None:
    hold = world.holding.hold(world.transfer())
    assert hold is not None
    transfer = world.transfer()
    world.is_lost = True
    assert not hold.is_current()
    assert world.holding.hold(transfer) is None
    hold.close()


@pytest.mark.parametrize("change", ["unregistered", "again", "replaced", "read-only"])
def test_a_registration_that_ends_or_changes_is_seen(world: _World, change: str) -> None:
    hold = world.holding.hold(world.transfer())
    assert hold is not None
    assert hold.is_current()
    if change == "unregistered":
        world.registrations.remove("x")
    elif change == "again":
        world.registrations.store(Transfer("x", IMAGE, idle_seconds=60))
    elif change == "replaced":
        world.registrations.store(Transfer("x", OTHER, idle_seconds=60))
    else:
        world.registrations.store(Transfer("x", IMAGE, read_only=True, idle_seconds=60))
    assert not hold.is_current()
    hold.close()


def test_a_file_that_ends_or_changes_is_seen(world: _World) -> None:
    hold = world.holding.hold(world.files["file"])
    assert hold is not None
    assert hold.is_current()
    file = world.files["file"]
    for change in ({"read_only": True}, {"changed_ns": 1}):  # which is a file made anew
        world.files["file"] = replace(file, **change)
        assert not hold.is_current()
        assert world.holding.hold(file) is None
    del world.files["file"]
    assert not hold.is_current()
    hold.close()
