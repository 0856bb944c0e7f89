# SPDX-License-Identifier: Apache-2.0
"""Inspection where nobody may wait: threads that must answer at once, servers that hang."""

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from imageserver.core.errors import BackendError, BackendTimeout, Exhausted
from imageserver.core.kinds import Image
from imageserver.images import probing
from imageserver.images.probing import MEMORY_SECONDS, Asking, WouldWait
from tests.unit.probed import DISK, FILE, OTHER, Probed, failing


@pytest.fixture
def world() -> Probed:
    return Probed()


# Threads that must not wait


@pytest.mark.parametrize(
    ("asking", "error"), [(Asking.ELSEWHERE, WouldWait), (Asking.NEVER, Exhausted)]
)
def test_who_must_not_wait_asks_nobody(
    world: Probed, asking: Asking, error: type[Exception]
) -> None:
    with pytest.raises(error):
        world.ask(asking=asking)
    assert world.opened == []


@pytest.mark.parametrize("asking", [Asking.ELSEWHERE, Asking.NEVER])
def test_who_must_not_wait_is_told_what_is_remembered(world: Probed, asking: Asking) -> None:
    world.ask()

    assert world.ask(asking=asking) == 1


@pytest.mark.parametrize(
    ("asking", "error"), [(Asking.ELSEWHERE, WouldWait), (Asking.NEVER, Exhausted)]
)
def test_who_must_not_wait_does_not_wait_for_a_query_under_way(
    world: Probed, asking: Asking, error: type[Exception]
) -> None:
    with _under_way(world), pytest.raises(error):
        world.ask(0.0, asking=asking)


@contextlib.contextmanager
def _under_way(world: Probed, image: Image = DISK) -> Iterator[None]:
    """Have a query asked that is answered when the block ends."""
    asked, go = threading.Event(), threading.Event()
    usual = world.before

    def wait() -> None:
        asked.set()
        assert go.wait(5)
        usual()

    def ask() -> None:
        with contextlib.suppress(BackendError):
            world.ask(0.0, image)

    with ThreadPoolExecutor(1) as thread:
        world.before = wait
        answer = thread.submit(ask)
        assert asked.wait(5)
        world.before = usual
        try:
            yield
        finally:
            go.set()
            answer.result(5)


@pytest.mark.parametrize(
    ("asking", "error"), [(Asking.ELSEWHERE, WouldWait), (Asking.NEVER, Exhausted)]
)
def test_files_that_hang_take_no_more_than_a_few_threads_that_must_not_wait(
    world: Probed, asking: Asking, error: type[Exception]
) -> None:
    asked, go = threading.Barrier(probing._FILES + 1), threading.Event()

    def hang() -> None:
        asked.wait(5)
        assert go.wait(5)

    world.before = hang
    with ThreadPoolExecutor(probing._FILES) as threads:
        hanging = [
            threads.submit(world.ask, 0.0, FILE, Asking.ELSEWHERE) for _ in range(probing._FILES)
        ]
        asked.wait(5)
        with pytest.raises(error):
            world.ask(image=FILE, asking=asking)
        go.set()
        for answer in hanging:
            answer.result(5)
    world.before = lambda: None
    world.ask(image=FILE, asking=asking)


# Servers that hang


def _silent(world: Probed, image: Image = DISK) -> None:
    world.before = failing(BackendTimeout("silent"))
    with pytest.raises(BackendTimeout):
        world.ask(0.0, image)


@pytest.mark.parametrize("asking", list(Asking))
def test_silence_is_remembered_for_a_second_by_all_who_ask(world: Probed, asking: Asking) -> None:
    _silent(world)
    world.seconds += 0.999

    with pytest.raises(BackendTimeout):
        world.ask(0.0, asking=asking)
    assert len(world.opened) == 1


def test_a_silent_server_is_asked_again_after_a_second(world: Probed) -> None:
    _silent(world)
    world.before = lambda: None
    world.seconds += MEMORY_SECONDS

    with pytest.raises(WouldWait):
        world.ask(asking=Asking.ELSEWHERE)
    assert world.ask(0.0) == 2
    assert world.ask(0.0) == 3


@pytest.mark.parametrize("asking", list(Asking))
def test_nobody_waits_while_a_silent_server_is_asked_again(world: Probed, asking: Asking) -> None:
    _silent(world)
    world.seconds += MEMORY_SECONDS
    with _under_way(world):
        with pytest.raises(BackendTimeout):
            world.ask(0.0, asking=asking)
        assert len(world.opened) == 2


def test_who_must_not_ask_is_told_of_an_old_silence(world: Probed) -> None:
    _silent(world)
    world.seconds += 1e6

    with pytest.raises(BackendTimeout):
        world.ask(0.0, asking=Asking.NEVER)


def test_a_new_server_is_not_taken_for_the_silent_one(world: Probed) -> None:
    _silent(world)
    world.before = lambda: None
    world.stamp = "second"

    assert world.ask(0.0) == 2


def test_only_a_few_silent_servers_are_asked_again_at_a_time(
    world: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_AGAIN", 1)
    _silent(world)
    _silent(world, OTHER)
    world.seconds += MEMORY_SECONDS
    with _under_way(world), pytest.raises(BackendTimeout):
        world.ask(0.0, OTHER)
    assert world.opened == [DISK, OTHER, DISK]

    with pytest.raises(BackendTimeout):
        world.ask(0.0, OTHER)
    assert world.opened[3:] == [OTHER]


def test_a_server_that_fails_at_once_is_asked_each_time(world: Probed) -> None:
    world.before = failing(BackendError("refused"))
    for _ in range(2):
        with pytest.raises(BackendError):
            world.ask(0.0)

    assert len(world.opened) == 2
