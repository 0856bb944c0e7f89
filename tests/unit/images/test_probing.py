# SPDX-License-Identifier: Apache-2.0
"""Inspection: one query at a time for each image, its answer shared, and soon forgotten."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.errors import (
    BackendError,
    BackendTimeout,
    Exhausted,
    FileAccessError,
    ImageServerError,
)
from imageserver.core.kinds import ImageInfo
from imageserver.images import probing
from imageserver.images.probing import MEMORY_SECONDS
from tests.unit.probed import DISK, FILE, OTHER, Probed, failing


@pytest.fixture
def world() -> Probed:
    return Probed()


def test_a_query_opens_and_closes_the_image(world: Probed) -> None:
    assert world.inspector.inspect(DISK) == ImageInfo(1, False, True, True)
    assert (world.opened, world.closed) == ([DISK], 1)


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        pytest.param(0.0, [1, 1], id="at-once"),
        pytest.param(0.999, [1, 1], id="within-a-second"),
        pytest.param(1.0, [1, 2], id="after-a-second"),
        pytest.param(1e9, [1, 2], id="much-later"),
    ],
)
def test_an_answer_is_remembered_for_a_second(
    world: Probed, seconds: float, sizes: list[int]
) -> None:
    first = world.ask()
    world.seconds += seconds

    assert [first, world.ask()] == sizes


def test_a_second_counts_from_the_answer_not_from_the_question(world: Probed) -> None:
    def take_long() -> None:
        world.seconds += 5.0

    world.before = take_long
    world.ask()
    world.seconds += 0.999

    assert world.ask() == 1


def test_who_wants_no_memory_gets_a_fresh_answer(world: Probed) -> None:
    assert [world.ask(), world.ask(0.0), world.ask(0.0)] == [1, 2, 3]


def test_an_answer_is_not_remembered_across_a_change_of_the_socket(world: Probed) -> None:
    world.ask()
    world.stamp = "second"

    assert [world.ask(), world.ask()] == [2, 2]


def test_a_socket_that_changes_during_the_query_makes_its_answer_stale(world: Probed) -> None:
    def replace() -> None:
        world.stamp = "second"

    world.before = replace
    world.ask()

    assert world.ask() == 2


def test_images_have_answers_of_their_own(world: Probed) -> None:
    images = [DISK, OTHER, NbdImage(DISK.socket, "vdb"), NbdImage(DISK.socket, "", "b0")]

    assert [world.ask(image=image) for image in [*images, *images]] == [1, 2, 3, 4] * 2


def test_files_are_asked_every_time(world: Probed) -> None:
    assert [world.ask(image=FILE), world.ask(image=FILE)] == [1, 2]


def test_many_probes_at_once_share_one_query(world: Probed) -> None:
    asked, go = threading.Event(), threading.Event()

    def wait() -> None:
        asked.set()
        assert go.wait(5)

    world.before = wait
    with ThreadPoolExecutor(16) as threads:
        first = threads.submit(world.ask, 0.0)
        assert asked.wait(5)
        # These find a query under way, whenever they come to look.
        waiting = [threads.submit(world.ask, 0.0) for _ in range(15)]
        while len(_waiters(world)) < 15:
            pass
        go.set()
        sizes = [answer.result(5) for answer in [first, *waiting]]

    assert (sizes, len(world.opened)) == ([1] * 16, 1)


def _waiters(world: Probed) -> list[object]:
    return list(world.inspector._queries[DISK].answer._condition._waiters)


def test_a_slow_image_does_not_delay_another(world: Probed) -> None:
    asked, go = threading.Event(), threading.Event()

    def wait() -> None:
        if world.opened[-1] == DISK and not asked.is_set():
            asked.set()
            assert go.wait(5)

    world.before = wait
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(world.ask)
        assert asked.wait(5)
        assert world.ask(image=OTHER) == 2
        go.set()
        slow.result(5)


@pytest.mark.parametrize(
    "error",
    [
        BackendError("refused: /run/disk.sock"),
        BackendTimeout("silent"),
        Exhausted("no descriptor is free"),
    ],
    ids=repr,
)
def test_a_failure_is_remembered_like_an_answer(world: Probed, error: ImageServerError) -> None:
    world.before = failing(error)
    raised = []
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            world.ask()
        raised.append(caught.value)

    assert [(type(e), str(e)) for e in raised] == [(type(error), str(error))] * 2
    assert world.opened == [DISK]


def test_each_who_shares_a_failure_has_an_exception_of_its_own(world: Probed) -> None:
    world.before = failing(BackendError("refused"))
    raised = []
    for _ in range(3):
        with pytest.raises(BackendError) as caught:
            world.ask()
        raised.append(caught.value)

    assert len({id(error) for error in raised}) == 3
    assert raised[1].__traceback__ is not raised[2].__traceback__
    assert [error.__context__ for error in raised] == [None] * 3


def test_a_failure_is_forgotten_after_a_second(world: Probed) -> None:
    world.before = failing(BackendError("refused"))
    with pytest.raises(BackendError):
        world.ask()

    world.before = lambda: None
    world.seconds += MEMORY_SECONDS

    assert world.ask() == 2


def test_a_bug_in_the_query_leaves_nobody_waiting(world: Probed) -> None:
    asked, go = threading.Event(), threading.Event()

    def break_down() -> None:
        asked.set()
        assert go.wait(5)
        raise RuntimeError("bug")

    world.before = break_down
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(world.ask)
        assert asked.wait(5)
        second = threads.submit(world.ask)
        while not _waiters(world):
            pass
        go.set()
        with pytest.raises(RuntimeError, match="bug"):
            first.result(5)
        with pytest.raises(BackendError, match="the query failed"):
            second.result(5)


def test_a_file_that_cannot_be_opened_is_the_askers_own_failure(world: Probed) -> None:
    world.before = failing(FileAccessError("gone"))

    with pytest.raises(FileAccessError):
        world.ask(image=FILE)


def test_only_so_many_answers_are_kept(world: Probed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_CAPACITY", 3)
    images = [NbdImage(f"/run/{number}.sock") for number in range(5)]
    for image in images:
        world.ask(image=image)

    assert list(world.inspector._queries) == images[2:]
    assert world.ask(image=images[0]) == 6


def test_who_was_asked_last_is_forgotten_last(
    world: Probed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_CAPACITY", 2)
    world.ask(image=DISK)
    world.ask(image=OTHER)
    world.ask(0.0, image=DISK)
    world.ask(image=NbdImage("/run/third.sock"))

    assert DISK in world.inspector._queries
    assert OTHER not in world.inspector._queries
