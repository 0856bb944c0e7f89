# SPDX-License-Identifier: Apache-2.0
"""The config directory: whose files count, and that nothing else is ever opened or waited for."""

import logging
import os
import stat
from pathlib import Path

import pytest

from imageserver.core.errors import UnknownImage
from imageserver.core.transfer import MAX_TRANSFER_SIZE
from imageserver.transfers.files import UntrustedDirectory
from tests.system.skips import needs
from tests.unit.places import ME, A, Place


@pytest.fixture
def place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Place:
    caplog.set_level(logging.WARNING, "imageserver.transfers.files")
    return Place(tmp_path, caplog)


# Trust


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o644, 0o755])
def test_a_file_that_only_its_owner_may_write_counts(place: Place, mode: int) -> None:
    place.put("t", A).chmod(mode)

    assert place.image() == "/images/a"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_does_not_count(place: Place, mode: int) -> None:
    place.put("t", A).chmod(mode)

    assert place.image() is None
    assert place.reports() == [f"can be written by group or others (mode {mode:04o})"]


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_directory_that_others_may_write_does_not_count(place: Place, mode: int) -> None:
    place.put("t", A)
    place.path.chmod(mode)

    assert place.image() is None
    assert place.reports() == [
        f"config directory: {place.path} can be written by group or others (mode {mode:04o})"
    ]


def test_a_directory_of_a_stranger_does_not_count(place: Place) -> None:
    place.put("t", A)
    stranger = place.another(owners=(ME + 1,))

    with pytest.raises(UnknownImage):
        stranger.get("t")
    with pytest.raises(UntrustedDirectory, match=f"belongs to uid {ME}, who is not in IMAGES"):
        stranger.check()


@needs("owners")
def test_a_file_of_a_stranger_does_not_count(place: Place) -> None:
    os.chown(place.put("t", A), 12345, 0)

    assert place.image() is None
    assert place.reports() == ["belongs to uid 12345, who is not in IMAGESERVER_CONFIG_OWNERS"]


def test_links_are_not_followed(place: Place) -> None:
    place.put("real", A)
    (place.path / "t").symlink_to("real")

    assert (place.image(), len(place.reports())) == (None, 1)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(os.mkfifo, id="fifo"),
        pytest.param(os.mkdir, id="directory"),
        pytest.param(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), id="socket"),
    ],
)
def test_only_regular_files_count_and_nothing_waits_for_others(place: Place, make: object) -> None:
    make(place.path / "t")  # type: ignore[operator]

    assert (place.image(), len(place.reports())) == (None, 1)


@pytest.mark.parametrize("excess", [0, 1, MAX_TRANSFER_SIZE])
def test_a_file_has_at_most_64_kib(place: Place, excess: int) -> None:
    place.put("t", A.ljust(MAX_TRANSFER_SIZE + excess))

    assert place.image() == (None if excess else "/images/a")
    assert place.reports() == (["larger than 65536 bytes"] if excess else [])


def test_a_directory_that_can_be_used_passes_the_check(place: Place) -> None:
    place.registry.check()


def test_a_missing_directory_fails_the_check_by_name(place: Place) -> None:
    place.path.rmdir()

    with pytest.raises(FileNotFoundError):
        place.registry.check()


def test_no_descriptor_is_left_open(place: Place) -> None:
    place.put("t", A)
    place.put("bad", "{")
    place.put("open", A).chmod(0o666)
    before = os.listdir("/proc/self/fd")

    for name in ("t", "bad", "open", "missing", "t"):
        place.image(name)

    assert os.listdir("/proc/self/fd") == before
