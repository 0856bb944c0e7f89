# SPDX-License-Identifier: Apache-2.0
"""The guard while another process, here another descriptor, is stopped inside it."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.core.errors import StateUnavailable
from imageserver.runtime.guard import Guard
from imageserver.runtime.private import open_private

PATIENCE = 0.4
_STUCK = "cannot be used now: another process holds its guard"


class _Stopped:
    """A process that holds the guard for as long as a test wants it to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.stop()

    def stop(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def go_on(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)


class _Clock:
    """Time that passes when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = open_private(str(tmp_path), "file")
    yield fd
    os.close(fd)


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[_Stopped]:
    fd = open_private(str(tmp_path), "file")
    yield _Stopped(fd)
    os.close(fd)


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def guard(fd: int, clock: _Clock) -> Guard:
    return Guard(fd, "the file", 5.0, clock, clock.sleep)


def _waited(guard: Guard, clock: _Clock, seconds: float | None = None) -> float:
    """Return how long a thread has waited for nothing."""
    began = clock.now
    with pytest.raises(StateUnavailable, match=f"^the file {_STUCK}$"):
        _take(guard, seconds)
    return clock.now - began


def _take(guard: Guard, seconds: float | None = None) -> None:
    with guard.hold(seconds):
        pass


def test_threads_that_wait_for_a_stopped_process_fail_together(fd: int, stopped: _Stopped) -> None:
    guard = Guard(fd, "the file", PATIENCE)
    began = time.monotonic()
    failed: list[float] = []

    def wait() -> None:
        with pytest.raises(StateUnavailable):
            _take(guard)
        failed.append(time.monotonic() - began)

    threads = [threading.Thread(target=wait) for _ in range(6)]
    for thread in threads:
        thread.start()
        time.sleep(PATIENCE / 20)  # each comes later than the one before it
    for thread in threads:
        thread.join(10)

    assert len(failed) == len(threads)
    assert min(failed) > PATIENCE * 0.9
    assert max(failed) < PATIENCE * len(threads) / 2  # twice that, one after another
    stopped.go_on()
    _take(guard)


def test_who_comes_when_the_guard_is_known_to_be_stuck_waits_for_a_moment_only(
    guard: Guard, clock: _Clock, stopped: _Stopped
) -> None:
    waits = [_waited(guard, clock) for _ in range(3)]
    assert waits == pytest.approx([5.0, 0.05, 0.05], abs=0.01)

    stopped.go_on()
    _take(guard)
    stopped.stop()
    assert _waited(guard, clock) == pytest.approx(5.0, abs=0.01)


def test_a_guard_stuck_long_ago_counts_for_nothing(
    guard: Guard, clock: _Clock, stopped: _Stopped
) -> None:
    assert _waited(guard, clock) == pytest.approx(5.0, abs=0.01)
    clock.now += 3600
    assert _waited(guard, clock) == pytest.approx(5.0, abs=0.01)
    del stopped


def test_a_guard_found_held_again_long_after_is_waited_for_anew(
    guard: Guard, clock: _Clock, stopped: _Stopped
) -> None:
    assert _waited(guard, clock) == pytest.approx(5.0, abs=0.01)
    clock.now += 3600
    assert _waited(guard, clock, 1.0) == pytest.approx(1.0, abs=0.01)
    assert _waited(guard, clock) == pytest.approx(4.0, abs=0.01)
    del stopped


def test_who_finds_the_guard_held_for_a_moment_waits_hardly_longer(
    fd: int, clock: _Clock, stopped: _Stopped
) -> None:
    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now > 100.0001:
            stopped.go_on()

    with Guard(fd, "the file", 5.0, clock, sleep).hold():
        assert clock.now - 100 < 0.0003


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_who_has_less_patience_waits_less(
    guard: Guard, clock: _Clock, stopped: _Stopped, seconds: float
) -> None:
    assert _waited(guard, clock, seconds) == pytest.approx(seconds, abs=seconds / 20)
    del stopped


def test_who_waits_for_a_thread_waits_no_longer_than_for_a_process(
    guard: Guard, clock: _Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, float]] = []
    threads = SimpleNamespace(acquire=lambda **how: asked.append(how))  # and does not get it
    monkeypatch.setattr(guard, "_threads", threads)

    assert _waited(guard, clock, 2.0) == 0
    assert asked == [{"blocking": False}, {"timeout": 2.0}]


def test_a_guard_is_let_go_whatever_happens_inside(guard: Guard, stopped: _Stopped) -> None:
    stopped.go_on()
    with pytest.raises(ZeroDivisionError), guard.hold():
        raise ZeroDivisionError
    stopped.stop()
    stopped.go_on()
    _take(guard)


def test_a_file_that_cannot_be_locked_is_an_error_of_ours(guard: Guard, fd: int) -> None:
    path = os.open("/", os.O_PATH)
    os.dup2(path, fd)
    os.close(path)

    for _ in range(2):  # and the threads' lock is free again
        with pytest.raises(StateUnavailable, match=r"^the file cannot be used now: Bad file"):
            _take(guard)


def test_a_guard_that_the_kernel_unlocks_late_fails_nobody_and_is_free(
    fd: int, stopped: _Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that was made, but whose guard could not be unlocked, was held by nobody for ever."""
    stopped.go_on()
    errors = [OSError(errno.EIO, "input/output error"), None]
    unlocked = fcntl.flock

    def unlock(file: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN and (error := errors.pop(0)):
            raise error
        unlocked(file, operation)

    guard = Guard(fd, "the file", PATIENCE)
    monkeypatch.setattr(fcntl, "flock", unlock)
    with guard.hold():
        pass
    stopped.stop()
    errors += [None, None]
    stopped.go_on()
    with guard.hold(0.0):
        pass
