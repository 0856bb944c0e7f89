# SPDX-License-Identifier: Apache-2.0
"""Up to which death an image is known to be settled: in memory, in its lock file, or not at all."""

import os
from pathlib import Path

import pytest

from imageserver.core.errors import StateUnavailable
from imageserver.core.slots import Deaths
from imageserver.runtime.locks import ImageLocks
from tests.unit.lockers import DISK, OTHER, is_busy, locks_in

FIRST, LATER, LAST = Deaths(7, 7), Deaths(7, 8), Deaths(7, 9)


@pytest.fixture
def images(tmp_path: Path) -> ImageLocks:
    return locks_in(tmp_path)


def _is_settled(images: ImageLocks, deaths: Deaths) -> bool:
    lock = images.acquire(DISK)
    try:
        return lock.is_settled(deaths)
    finally:
        lock.release()


def _settle(images: ImageLocks, deaths: Deaths) -> None:
    lock = images.acquire(DISK)
    lock.settle(deaths)
    lock.release()


def test_where_nobody_has_died_yet_nothing_is_awaited_and_nothing_written(
    tmp_path: Path, images: ImageLocks
) -> None:
    assert _is_settled(images, FIRST)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b""]


def test_an_image_that_nobody_has_looked_at_since_a_death_is_not_settled(
    images: ImageLocks,
) -> None:
    assert not _is_settled(images, LATER)


def test_nobody_having_died_is_remembered_only_until_somebody_does(images: ImageLocks) -> None:
    assert [_is_settled(images, deaths) for deaths in (FIRST, FIRST, LATER)] == [True, True, False]


def test_an_image_stays_unsettled_until_somebody_settles(images: ImageLocks) -> None:
    assert [_is_settled(images, LATER) for _ in range(2)] == [False, False]
    _settle(images, LATER)
    assert [_is_settled(images, deaths) for deaths in (LATER, LAST)] == [True, False]


def test_what_one_process_has_settled_others_know(tmp_path: Path, images: ImageLocks) -> None:
    _settle(images, LATER)

    another = locks_in(tmp_path)
    assert [_is_settled(another, deaths) for deaths in (LATER, LATER, LAST)] == [True, True, False]


def test_one_image_is_not_settled_with_another(images: ImageLocks) -> None:
    _settle(images, LATER)

    lock = images.acquire(OTHER)
    assert not lock.is_settled(LATER)
    lock.release()


def test_what_was_settled_under_another_table_counts_for_nothing(
    tmp_path: Path, images: ImageLocks
) -> None:
    _settle(images, LATER)

    assert not _is_settled(locks_in(tmp_path), Deaths(100, 100))


@pytest.mark.parametrize(
    "text",
    [b"123 456", b"123 456 shared", b"held", b"settled ", b"settled 8", b"\0" * 64],
    ids=["mark", "shared-mark", "words", "cut", "no-count", "zeros"],
)
@pytest.mark.parametrize("deaths", [FIRST, LATER], ids=["nobody-died", "somebody-died"])
def test_a_file_that_says_anything_else_means_look_and_is_written_over(
    tmp_path: Path, images: ImageLocks, text: bytes, deaths: Deaths
) -> None:
    images.acquire(DISK).release()
    (file,) = tmp_path.iterdir()
    file.write_bytes(text.ljust(64))

    assert not _is_settled(images, deaths)
    _settle(images, deaths)
    assert _is_settled(locks_in(tmp_path), deaths)


def test_a_note_that_cannot_be_written_makes_the_next_process_look_again(
    tmp_path: Path, images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    _settle(images, LATER)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        _settle(images, LAST)

    assert _is_settled(images, LAST)
    assert not _is_settled(locks_in(tmp_path), LAST)


def test_a_file_that_cannot_be_read_is_an_error_of_ours(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", refuse)
        with pytest.raises(StateUnavailable, match="the lock files cannot be used now: Input/o"):
            _is_settled(images, LATER)
    assert not is_busy(images)


def test_a_process_forgets_what_it_has_noted_before_it_remembers_too_much(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imageserver.runtime.locks._MOST_NOTED", 1)
    _settle(images, LATER)
    lock = images.acquire(OTHER)
    lock.settle(LATER)
    lock.release()

    assert len(images._noted) == 1
    assert _is_settled(images, LATER)  # the file says so


def test_what_this_process_knows_is_told_without_the_lock(images: ImageLocks) -> None:
    known = [images.settled_at(DISK)]
    assert _is_settled(images, FIRST)
    known.append(images.settled_at(DISK))
    _settle(images, LATER)
    lock = images.acquire(DISK)
    known += [images.settled_at(DISK), images.settled_at(OTHER)]
    lock.release()

    assert known == [None, FIRST.count, LATER.count, None]


def test_nothing_is_told_where_the_lock_files_are_gone(tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    images = locks_in(locks)
    _settle(images, LATER)
    locks.rename(tmp_path / "elsewhere")

    with pytest.raises(StateUnavailable):
        images.settled_at(DISK)
