# SPDX-License-Identifier: Apache-2.0
"""What an open session has beside its back end: extents or none, and more links to its image."""

from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.backends.file.raw import RawFiles
from imageserver.core.errors import BackendError
from imageserver.core.transfer import Transfer
from imageserver.images import sessions
from imageserver.images.sessions import Sessions
from tests.unit.fakes import FILE_TRANSFER, TRANSFER, FakeLocks, FakeSlots, World, a_request


@pytest.mark.parametrize(("transfer", "has_extents"), [(TRANSFER, True), (FILE_TRANSFER, False)])
def test_a_session_tells_whether_its_kind_of_image_has_extents(
    transfer: Transfer, has_extents: bool
) -> None:
    session = World().sessions().open(transfer, sessions.CHECKSUM, a_request())

    assert session.has_extents is has_extents


def test_another_link_is_one_to_the_image_that_was_locked_and_is_closed_with_the_session() -> None:
    world, check = World(), a_request().check

    with world.sessions().open(TRANSFER, sessions.CHECKSUM, a_request()) as session:
        session.open_link(check)

    image = TRANSFER.image.pinned()
    assert world.images == [image, image]
    assert world.checks[1] == check
    assert [note for note in world.journal if note.startswith(("open", "close"))] == [
        *("open EXTENTS", "open INSPECT", "close", "close"),
    ]


def test_a_link_to_another_file_that_was_renamed_over_the_image_is_refused(tmp_path: Path) -> None:
    disk, other = tmp_path / "disk", tmp_path / "other"
    for path in (disk, other):
        path.write_bytes(b"0123456789")
    world = World()
    opened = Sessions(
        *(FakeLocks(world), FakeSlots(world), RawFiles(4096), lambda _: "key"),
        shares_lock=False,
        counts_readers=False,
        meter=world,
    )
    transfer = Transfer("t1", FileImage(str(disk), raw=True))

    with opened.open(transfer, sessions.CHECKSUM, a_request()) as session:
        session.open_link(lambda: None)
        other.rename(disk)
        with pytest.raises(BackendError, match=r"^another file or server has taken the image's"):
            session.open_link(lambda: None)
