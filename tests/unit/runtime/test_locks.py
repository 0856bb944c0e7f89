# SPDX-License-Identifier: Apache-2.0
"""Image locks on real files: exclusion between threads and processes."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.core.errors import Exhausted, ImageBusy, StateFull, StateUnavailable
from imageserver.runtime import locks
from imageserver.runtime.locks import ImageLocks, image_key
from tests.unit.lockers import DISK, OTHER, holder, is_busy, locks_in
from tests.unit.shortages import open_descriptors


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "locks").mkdir()
    return tmp_path / "locks"


@pytest.fixture
def images(directory: Path) -> ImageLocks:
    return locks_in(directory)


# Exclusion


def test_an_image_has_one_holder(images: ImageLocks) -> None:
    held = images.acquire(DISK)

    with pytest.raises(ImageBusy):
        images.acquire(DISK)
    held.release()
    images.acquire(DISK).release()


def test_other_images_are_free(images: ImageLocks) -> None:
    held = images.acquire(DISK)

    images.acquire(OTHER).release()
    held.release()


def test_of_many_threads_one_gets_the_image(images: ImageLocks) -> None:
    barrier = threading.Barrier(8)

    def acquire() -> locks.ImageLock | None:
        barrier.wait(5)
        try:
            return images.acquire(DISK)
        except ImageBusy:
            return None

    with ThreadPoolExecutor(8) as threads:
        got = [lock for lock in threads.map(lambda _: acquire(), range(8)) if lock]

    assert len(got) == 1
    got[0].release()


def test_another_thread_may_release(images: ImageLocks) -> None:
    held = images.acquire(DISK)
    thread = threading.Thread(target=held.release)
    thread.start()
    thread.join()

    assert not is_busy(images)


def test_releasing_twice_does_not_take_the_next_holders_lock(images: ImageLocks) -> None:
    first = images.acquire(DISK)
    first.release()
    second = images.acquire(DISK)
    first.release()

    assert is_busy(images)
    second.release()


def test_a_lock_that_was_let_go_closes_no_descriptor_of_others(images: ImageLocks) -> None:
    lock = images.acquire(DISK)
    before = open_descriptors()
    lock.release()
    lock.release()

    assert len(before - open_descriptors()) == 1


def test_a_lock_whose_descriptor_is_0_is_let_go_like_any(images: ImageLocks) -> None:
    """A server may be started with its standard input closed."""
    images.acquire(DISK).release()
    stdin = os.dup(0)
    try:
        os.close(0)
        images.acquire(DISK).release()
        assert not is_busy(images)
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)


def test_a_file_that_cannot_be_unlocked_is_let_go_all_the_same(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "unlock_descriptor", refuse)
    images.acquire(DISK).release()

    assert not is_busy(images)


def test_another_process_holds_an_image_until_it_lets_go(
    directory: Path, images: ImageLocks
) -> None:
    with holder(directory) as process:
        assert is_busy(images)
        process.communicate("go\n", timeout=10)

        images.acquire(DISK).release()


def test_the_image_of_a_killed_holder_is_free(directory: Path, images: ImageLocks) -> None:
    with holder(directory) as process:
        assert is_busy(images)
        process.kill()
        process.wait(10)

        images.acquire(DISK).release()


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, StateFull), (errno.EMFILE, Exhausted), (errno.EIO, StateUnavailable)],
)
def test_a_lock_file_that_cannot_be_made_is_an_error_of_ours(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    images.acquire(DISK).release()

    def refuse(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(error, match=f"the lock files cannot be used.*{os.strerror(code)}"):
            images.acquire(DISK)
    assert not is_busy(images)


# For a moment


@pytest.mark.parametrize("waits", [True, False], ids=["for-sharers", "for-the-dying"])
def test_who_has_the_image_for_a_moment_is_waited_for(
    directory: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    asked, waited = [], []

    def gives_way(key: str, *, to_sharers: bool) -> bool:
        asked.append((key, to_sharers))
        return True

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 1000:
            held.release()

    images = locks_in(directory, gives_way)
    held = images.acquire(DISK)
    # Other threads sleep, too; and on a busy machine seconds may pass meanwhile.
    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: 1000.0)
    monkeypatch.setattr(locks, "time", clock)

    (images.acquire_briefly if waits else images.acquire)(DISK).release()
    assert len(waited) == 1000
    assert asked == [(image_key(DISK), waits)] * 1000


@pytest.mark.parametrize("waits", [True, False])
def test_who_keeps_the_image_is_waited_for_by_nobody(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    clock = SimpleNamespace(sleep=lambda _: pytest.fail("it has waited"), monotonic=lambda: 1000.0)
    monkeypatch.setattr(locks, "time", clock)  # other threads sleep, too
    held = images.acquire(DISK)

    with pytest.raises(ImageBusy):
        (images.acquire_briefly if waits else images.acquire)(DISK)
    held.release()


def test_nobody_waits_for_a_moment_for_ever(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_SHARE_SECONDS", 0.01)
    monkeypatch.setattr(locks, "EXIT_SECONDS", 0.01)
    images = locks_in(directory, lambda *_, **__: True)
    held = images.acquire_briefly(DISK)

    with pytest.raises(ImageBusy):
        images.acquire_briefly(DISK)
    held.release()
