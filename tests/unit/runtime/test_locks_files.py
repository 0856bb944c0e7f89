# SPDX-License-Identifier: Apache-2.0
"""The lock files: private, pruned when idle, no locks where others remove or replace them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imageserver.core.errors import StateUnavailable
from imageserver.core.slots import Deaths
from imageserver.runtime import locks
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.locks import ImageLocks, image_key
from tests.unit.lockers import DISK, OTHER, age, is_busy, locks_in
from tests.unit.shortages import open_descriptors


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "locks").mkdir()
    return tmp_path / "locks"


@pytest.fixture
def images(directory: Path) -> ImageLocks:
    return locks_in(directory)


def test_lock_files_are_private(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release()

    assert [file.stat().st_mode & 0o777 for file in directory.iterdir()] == [0o600]


# Pruning


def test_idle_lock_files_are_pruned(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release()
    images.acquire(OTHER).release()
    age(directory, 3601)

    assert (images.prune(), list(directory.iterdir())) == (2, [])


def test_lock_files_in_recent_use_are_kept(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release()
    age(directory, 3500)

    assert (images.prune(), len(list(directory.iterdir()))) == (0, 1)


def test_idle_lock_files_are_pruned_whatever_lies_among_them(
    directory: Path, images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.acquire(DISK).release()
    age(directory, 3601)
    (idle,) = os.listdir(directory)
    images.acquire(OTHER).release()
    (recent,) = set(os.listdir(directory)) - {idle}
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda _: ["gone.lock", recent, idle])
        assert images.prune() == 1
    assert [file.name for file in directory.iterdir()] == [recent]


def test_a_link_in_a_lock_files_place_is_not_followed(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release()
    (file,) = directory.iterdir()
    file.rename(directory / "elsewhere")
    file.symlink_to("elsewhere")

    with pytest.raises(StateUnavailable, match="the lock files cannot be used now"):
        images.acquire(DISK)


def test_a_lock_file_says_what_every_version_reads(directory: Path, images: ImageLocks) -> None:
    lock = images.acquire(DISK)
    lock.settle(Deaths(1, 42))
    lock.release()

    (file,) = directory.iterdir()
    assert file.read_bytes() == b"settled 000000000000002a".ljust(64)


def test_lock_files_that_say_what_is_settled_are_pruned(
    directory: Path, images: ImageLocks
) -> None:
    lock = images.acquire(DISK)
    lock.settle(Deaths(1, 2))
    lock.release()
    age(directory, 3601)

    assert (images.prune(), list(directory.iterdir())) == (1, [])


def test_lock_files_with_the_mark_of_an_older_version_are_kept_however_old(
    directory: Path, images: ImageLocks
) -> None:
    images.acquire(DISK).release()
    (file,) = directory.iterdir()
    file.write_bytes(b"123 456 shared".ljust(64))
    age(directory, 1e6)

    assert (images.prune(), list(directory.iterdir())) == (0, [file])


def test_held_lock_files_are_kept_however_old(directory: Path, images: ImageLocks) -> None:
    held = images.acquire(DISK)
    age(directory, 1e6)

    assert images.prune() == 0
    assert is_busy(images)
    held.release()


def test_an_image_is_exclusive_again_after_its_file_was_pruned(
    directory: Path, images: ImageLocks
) -> None:
    images.acquire(DISK).release()
    age(directory, 3601)
    images.prune()
    held = images.acquire(DISK)

    assert is_busy(images)
    held.release()


# A directory that others have removed


def test_locks_of_a_removed_directory_are_refused_and_no_other_is_made(
    directory: Path, images: ImageLocks
) -> None:
    held = images.acquire(DISK)
    shutil.rmtree(directory)

    with pytest.raises(StateUnavailable, match=f"^{directory} was removed or replaced$"):
        images.acquire(OTHER)
    assert not directory.exists()
    held.release()


def test_a_directory_removed_at_the_last_moment_is_not_made_either(
    directory: Path, images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.acquire(DISK).release()
    monkeypatch.setattr(KeptDirectory, "require", lambda _: shutil.rmtree(directory))

    with pytest.raises(StateUnavailable):
        images.acquire(OTHER)
    assert not directory.exists()


_Spoil = Callable[[Path], None]


def _remove(file: Path) -> None:
    file.unlink()


def _rename(file: Path) -> None:
    file.rename(file.with_name("away"))


def _replace(file: Path) -> None:
    _rename(file)
    file.touch()


def _link(file: Path) -> None:
    _rename(file)
    file.symlink_to("away")


@pytest.fixture
def spoil_late(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[_Spoil], None]:
    """Return what has a lock file spoiled, once, between open(2) and flock(2)."""

    def spoil_late(spoil: _Spoil) -> None:
        really, left = locks.lock_descriptor, [spoil]

        def late(fd: int, *, blocking: bool) -> bool:
            if left:
                left.pop()(directory / f"{image_key(DISK)}.lock")
            return really(fd, blocking=blocking)

        monkeypatch.setattr(locks, "lock_descriptor", late)

    return spoil_late


@pytest.mark.parametrize("spoil", [_remove, _rename, _replace])
def test_a_file_that_loses_its_name_before_it_is_locked_is_no_lock(
    images: ImageLocks, spoil_late: Callable[[_Spoil], None], spoil: _Spoil
) -> None:
    images.acquire(OTHER).release()
    before = open_descriptors()
    spoil_late(spoil)
    held = images.acquire(DISK)

    assert is_busy(images)
    held.release()
    assert open_descriptors() == before


def test_a_file_that_a_link_leads_to_before_it_is_locked_is_no_lock(
    images: ImageLocks, spoil_late: Callable[[_Spoil], None]
) -> None:
    images.acquire(OTHER).release()
    before = open_descriptors()
    spoil_late(_link)

    with pytest.raises(StateUnavailable, match="Too many levels of symbolic links"):
        images.acquire(DISK)
    assert open_descriptors() == before
