# SPDX-License-Identifier: Apache-2.0
"""Image locks on real files: exclusion between threads and processes, pruning."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.core.errors import ImageBusy, StateUnavailable
from imageserver.runtime import locks
from imageserver.runtime.directory import KeptDirectory
from imageserver.runtime.locks import ImageLocks, image_key
from tests.unit.lockers import DISK, OTHER, age, holder, is_busy, locks_in


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
    held.release(settled=True)
    images.acquire(DISK).release(settled=True)


def test_other_images_are_free(images: ImageLocks) -> None:
    held = images.acquire(DISK)

    images.acquire(OTHER).release(settled=True)
    held.release(settled=True)


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
    got[0].release(settled=True)


def test_another_thread_may_release(images: ImageLocks) -> None:
    held = images.acquire(DISK)
    thread = threading.Thread(target=lambda: held.release(settled=True))
    thread.start()
    thread.join()

    assert not is_busy(images)


def test_releasing_twice_does_not_take_the_next_holders_lock(images: ImageLocks) -> None:
    first = images.acquire(DISK)
    first.release(settled=True)
    second = images.acquire(DISK)
    first.release(settled=False)

    assert is_busy(images)
    second.release(settled=True)


def test_another_process_holds_an_image_until_it_lets_go(
    directory: Path, images: ImageLocks
) -> None:
    with holder(directory) as process:
        assert is_busy(images)
        process.communicate("go\n", timeout=10)

        lock = images.acquire(DISK)

    assert not lock.abandoned
    lock.release(settled=True)


def test_a_refusal_does_not_disturb_the_holder_nor_its_mark(
    directory: Path, images: ImageLocks
) -> None:
    with holder(directory) as process:
        assert is_busy(images)
        process.kill()
        process.wait(10)
        lock = images.acquire(DISK)

    assert lock.abandoned
    lock.release(settled=True)


# For a moment


@pytest.mark.parametrize("shared", [True, False], ids=["to-share", "alone"])
def test_who_has_the_image_for_a_moment_is_waited_for(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    held = images.acquire_briefly(DISK, shared=True)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1000:
            held.release(settled=False)

    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)  # other threads sleep, too
    monkeypatch.setattr(locks, "time", clock)

    images.acquire_briefly(DISK, shared=shared).release(settled=True)
    assert len(waits) == 1000


def test_who_has_the_image_alone_is_waited_for_by_nobody(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.time, "sleep", lambda _: pytest.fail("it has waited"))
    held = images.acquire(DISK)

    with pytest.raises(ImageBusy):
        images.acquire_briefly(DISK, shared=True)
    held.release(settled=True)


def test_who_wants_the_image_alone_waits_for_nobody(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks.time, "sleep", lambda _: pytest.fail("it has waited"))
    held = images.acquire_briefly(DISK, shared=True)

    with pytest.raises(ImageBusy):
        images.acquire(DISK)
    held.release(settled=True)


def test_nobody_waits_for_a_moment_for_ever(
    images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_SHARE_SECONDS", 0.01)
    monkeypatch.setattr(locks, "EXIT_SECONDS", 0.01)
    held = images.acquire_briefly(DISK, shared=True)

    with pytest.raises(ImageBusy):
        images.acquire_briefly(DISK, shared=True)
    held.release(settled=True)


def test_lock_files_are_private(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release(settled=True)

    assert [file.stat().st_mode & 0o777 for file in directory.iterdir()] == [0o600]


# Pruning


def test_idle_lock_files_are_pruned(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release(settled=True)
    images.acquire(OTHER).release(settled=True)
    age(directory, 3601)

    assert (images.prune(), list(directory.iterdir())) == (2, [])


def test_lock_files_in_recent_use_are_kept(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release(settled=True)
    age(directory, 3500)

    assert (images.prune(), len(list(directory.iterdir()))) == (0, 1)


def test_marked_lock_files_are_kept_however_old(directory: Path, images: ImageLocks) -> None:
    images.acquire(DISK).release(settled=False)
    age(directory, 1e6)

    assert images.prune() == 0
    lock = images.acquire(DISK)
    assert lock.abandoned
    lock.release(settled=True)


def test_held_lock_files_are_kept_however_old(directory: Path, images: ImageLocks) -> None:
    held = images.acquire(DISK)
    os.truncate(next(directory.iterdir()), 0)
    age(directory, 1e6)

    assert images.prune() == 0
    assert is_busy(images)
    held.release(settled=True)


def test_a_lock_file_that_is_marked_while_it_is_pruned_is_kept(
    directory: Path, images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.acquire(DISK).release(settled=True)
    age(directory, 3601)
    real = locks.ImageLock

    def after_another(directory: KeptDirectory, name: str, mark: bytes) -> locks.ImageLock:
        real(directory, name, mark).release(settled=False)
        return real(directory, name, mark)

    with monkeypatch.context() as patch:
        patch.setattr(locks, "ImageLock", after_another)
        images.prune()
    lock = images.acquire(DISK)
    lock.release(settled=True)

    assert lock.abandoned


def test_an_image_is_exclusive_again_after_its_file_was_pruned(
    directory: Path, images: ImageLocks
) -> None:
    images.acquire(DISK).release(settled=True)
    age(directory, 3601)
    images.prune()
    held = images.acquire(DISK)

    assert is_busy(images)
    held.release(settled=True)


# A directory that others have removed


def test_locks_of_a_removed_directory_are_refused_and_no_other_is_made(
    directory: Path, images: ImageLocks
) -> None:
    held = images.acquire(DISK)
    shutil.rmtree(directory)

    with pytest.raises(StateUnavailable, match=f"^{directory} was removed or replaced$"):
        images.acquire(OTHER)
    assert not directory.exists()
    held.release(settled=True)


def test_a_directory_removed_at_the_last_moment_is_not_made_either(
    directory: Path, images: ImageLocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.acquire(DISK).release(settled=True)
    monkeypatch.setattr(KeptDirectory, "require", lambda _: shutil.rmtree(directory))

    with pytest.raises(StateUnavailable):
        images.acquire(OTHER)
    assert not directory.exists()


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


def _rename_directory(file: Path) -> None:
    file.parent.rename(file.parent.with_name("away"))


SPOILT = pytest.mark.parametrize("spoil", [_remove, _rename, _replace, _link, _rename_directory])


@SPOILT
def test_a_lock_that_the_next_request_would_not_find_knows_it(
    directory: Path, images: ImageLocks, spoil: Callable[[Path], None]
) -> None:
    held = images.acquire(DISK)
    before = held.is_in_place()
    spoil(next(directory.iterdir()))

    assert (before, held.is_in_place()) == (True, False)
    held.release(settled=True)


@pytest.mark.parametrize("spoil", [_remove, _rename, _replace])
def test_a_file_that_loses_its_name_before_it_is_locked_is_no_lock(
    directory: Path,
    images: ImageLocks,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
) -> None:
    really, left = locks.lock_descriptor, [1]

    def late(fd: int, *, blocking: bool) -> bool:
        if left[0]:
            left[0] -= 1
            spoil(directory / f"{image_key(DISK)}.lock")
        return really(fd, blocking=blocking)

    monkeypatch.setattr(locks, "lock_descriptor", late)
    held = images.acquire(DISK)

    assert held.is_in_place()
    assert is_busy(images)
    held.release(settled=True)
