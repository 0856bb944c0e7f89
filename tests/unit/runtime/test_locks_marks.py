# SPDX-License-Identifier: Apache-2.0
"""Image locks on real files: what the dead and the dying leave behind."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from imageserver.core.errors import StateFull, StateUnavailable
from imageserver.core.slots import Owner
from imageserver.runtime import locks
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.locks import ImageLocks
from tests.unit.lockers import DISK, holder, is_busy, locks_in, me


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def images(directory: Path) -> ImageLocks:
    return locks_in(directory)


# What the dead leave behind


def test_the_image_of_a_killed_holder_is_free_and_marked(
    directory: Path, images: ImageLocks
) -> None:
    with holder(directory) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(10)

        lock = images.acquire(DISK)

    assert lock.abandoned
    lock.release(settled=True)


def test_a_fresh_image_is_not_marked(images: ImageLocks) -> None:
    lock = images.acquire(DISK)

    assert not lock.abandoned
    lock.release(settled=True)


@pytest.mark.parametrize("settled", [True, False])
def test_an_image_given_back_unsettled_is_marked_for_the_next(
    images: ImageLocks, settled: bool
) -> None:
    images.acquire(DISK).release(settled=settled)
    lock = images.acquire(DISK)

    assert lock.abandoned is not settled
    lock.release(settled=True)


def test_a_mark_stays_until_somebody_settles(images: ImageLocks) -> None:
    found = []
    for settled in (False, False, True, True):
        lock = images.acquire(DISK)
        found.append(lock.abandoned)
        lock.release(settled=settled)

    assert found == [False, True, True, False]


def test_a_lock_that_cannot_be_marked_is_not_held(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(StateFull, match="No space left"):
            images.acquire(DISK)

    assert not is_busy(images)


def test_a_mark_survives_one_that_cannot_be_written(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    images.acquire(DISK).release(settled=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with contextlib.suppress(StateFull):
            images.acquire(DISK)
    lock = images.acquire(DISK)
    lock.release(settled=True)

    assert lock.abandoned


def test_a_lock_is_not_held_where_it_cannot_be_told_who_left_the_mark(directory: Path) -> None:
    def no_descriptor(_owner: Owner) -> bool:
        raise OSError(24, "Too many open files")

    images = locks_in(directory)
    images.acquire(DISK).release(settled=False)
    with pytest.raises(StateUnavailable, match="Too many open files"):
        ImageLocks(KeptDirectory(str(directory)), no_descriptor, me, no_descriptor).acquire(DISK)
    lock = images.acquire(DISK)

    assert lock.abandoned
    lock.release(settled=True)


def test_a_dying_holder_is_waited_for_and_leaves_its_mark(directory: Path) -> None:
    asked = []

    def let_go(owner: Owner) -> bool:
        asked.append(owner)
        held.release(settled=False)
        return True

    images = locks_in(directory, let_go)
    held = images.acquire(DISK)
    lock = images.acquire(DISK)

    assert (lock.abandoned, asked) == (True, [me()])
    lock.release(settled=True)


def test_a_holder_that_does_not_end_its_dying_is_busy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "EXIT_SECONDS", 0.01)
    images = locks_in(directory, lambda _: True)
    held = images.acquire(DISK)

    assert is_busy(images)
    held.release(settled=True)


@pytest.mark.parametrize("text", [b"", b"held", b"1 x", b"123"])
def test_a_holder_whose_mark_says_nothing_is_believed(directory: Path, text: bytes) -> None:
    images = locks_in(directory, lambda _: True)
    held = images.acquire(DISK)
    next(directory.iterdir()).write_bytes(text)

    assert is_busy(images)
    held.release(settled=True)
