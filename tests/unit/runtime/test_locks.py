# SPDX-License-Identifier: Apache-2.0
"""Image locks on real files: exclusion between threads and processes, pruning."""

import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.core.errors import Exhausted, ImageBusy, StateFull, StateUnavailable
from imageserver.core.slots import Deaths
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


def _remove(file: Path) -> None:
    file.unlink()


def _rename(file: Path) -> None:
    file.rename(file.with_name("away"))


def _replace(file: Path) -> None:
    _rename(file)
    file.touch()


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

    assert is_busy(images)
    held.release()
