# SPDX-License-Identifier: Apache-2.0
"""Inspection: one query at a time for each image, its answer shared, and soon forgotten."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.errors import (
    BackendError,
    BackendTimeout,
    Exhausted,
    FileAccessError,
    ImageServerError,
)
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import Intent
from imageserver.images import probing
from imageserver.images.probing import MEMORY_SECONDS, Asking, Inspector, WouldWait

DISK = NbdImage("/run/disk.sock")
OTHER = NbdImage("/run/other.sock")
FILE = FileImage("/images/disk.raw")


class _Image:
    """Back ends whose images grow by one byte with every query; also a clock and a stamp."""

    def __init__(self) -> None:
        self.opened: list[Image] = []
        self.closed = 0
        self.seconds = 100.0
        self.stamp: object = "first"
        self.before: Callable[[], None] = lambda: None
        self.inspector = Inspector(self, lambda _: self.stamp, lambda: self.seconds)
        self.size = 0

    def open(self, image: Image, intent: Intent) -> "_Image":
        assert intent is Intent.INSPECT
        self.opened.append(image)
        self.size = len(self.opened)
        self.before()
        return self

    def settle(self, _image: Image) -> None:
        raise AssertionError

    @property
    def info(self) -> ImageInfo:
        return ImageInfo(self.size, read_only=False, can_zero=True, can_flush=True)

    def close(self) -> None:
        self.closed += 1

    def ask(
        self, max_age: float = MEMORY_SECONDS, image: Image = DISK, asking: Asking = Asking.NOW
    ) -> int:
        return self.inspector.inspect(image, max_age, asking).size


@pytest.fixture
def world() -> _Image:
    return _Image()


def _raise(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def test_a_query_opens_and_closes_the_image(world: _Image) -> None:
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
    world: _Image, seconds: float, sizes: list[int]
) -> None:
    first = world.ask()
    world.seconds += seconds

    assert [first, world.ask()] == sizes


def test_a_second_counts_from_the_answer_not_from_the_question(world: _Image) -> None:
    def take_long() -> None:
        world.seconds += 5.0

    world.before = take_long
    world.ask()
    world.seconds += 0.999

    assert world.ask() == 1


def test_who_wants_no_memory_gets_a_fresh_answer(world: _Image) -> None:
    assert [world.ask(), world.ask(0.0), world.ask(0.0)] == [1, 2, 3]


def test_an_answer_is_not_remembered_across_a_change_of_the_socket(world: _Image) -> None:
    world.ask()
    world.stamp = "second"

    assert [world.ask(), world.ask()] == [2, 2]


def test_a_socket_that_changes_during_the_query_makes_its_answer_stale(world: _Image) -> None:
    def replace() -> None:
        world.stamp = "second"

    world.before = replace
    world.ask()

    assert world.ask() == 2


def test_images_have_answers_of_their_own(world: _Image) -> None:
    images = [DISK, OTHER, NbdImage(DISK.socket, "vdb"), NbdImage(DISK.socket, "", "b0")]

    assert [world.ask(image=image) for image in [*images, *images]] == [1, 2, 3, 4] * 2


def test_files_are_asked_every_time(world: _Image) -> None:
    assert [world.ask(image=FILE), world.ask(image=FILE)] == [1, 2]


def test_many_probes_at_once_share_one_query(world: _Image) -> None:
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


def _waiters(world: _Image) -> list[object]:
    return list(world.inspector._queries[DISK].answer._condition._waiters)


def test_a_slow_image_does_not_delay_another(world: _Image) -> None:
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
def test_a_failure_is_remembered_like_an_answer(world: _Image, error: ImageServerError) -> None:
    world.before = _raise(error)
    raised = []
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            world.ask()
        raised.append(caught.value)

    assert [(type(e), str(e)) for e in raised] == [(type(error), str(error))] * 2
    assert world.opened == [DISK]


def test_each_who_shares_a_failure_has_an_exception_of_its_own(world: _Image) -> None:
    world.before = _raise(BackendError("refused"))
    raised = []
    for _ in range(3):
        with pytest.raises(BackendError) as caught:
            world.ask()
        raised.append(caught.value)

    assert len({id(error) for error in raised}) == 3
    assert raised[1].__traceback__ is not raised[2].__traceback__
    assert [error.__context__ for error in raised] == [None] * 3


def test_a_failure_is_forgotten_after_a_second(world: _Image) -> None:
    world.before = _raise(BackendError("refused"))
    with pytest.raises(BackendError):
        world.ask()

    world.before = lambda: None
    world.seconds += MEMORY_SECONDS

    assert world.ask() == 2


def test_a_bug_in_the_query_leaves_nobody_waiting(world: _Image) -> None:
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


def test_a_file_that_cannot_be_opened_is_the_askers_own_failure(world: _Image) -> None:
    world.before = _raise(FileAccessError("gone"))

    with pytest.raises(FileAccessError):
        world.ask(image=FILE)


def test_only_so_many_answers_are_kept(world: _Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_CAPACITY", 3)
    images = [NbdImage(f"/run/{number}.sock") for number in range(5)]
    for image in images:
        world.ask(image=image)

    assert list(world.inspector._queries) == images[2:]
    assert world.ask(image=images[0]) == 6


def test_who_was_asked_last_is_forgotten_last(
    world: _Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "_CAPACITY", 2)
    world.ask(image=DISK)
    world.ask(image=OTHER)
    world.ask(0.0, image=DISK)
    world.ask(image=NbdImage("/run/third.sock"))

    assert DISK in world.inspector._queries
    assert OTHER not in world.inspector._queries


# Threads that must not wait


@pytest.mark.parametrize(
    ("asking", "error"), [(Asking.ELSEWHERE, WouldWait), (Asking.NEVER, Exhausted)]
)
def test_who_must_not_wait_asks_nobody(
    world: _Image, asking: Asking, error: type[Exception]
) -> None:
    with pytest.raises(error):
        world.ask(asking=asking)
    assert world.opened == []


@pytest.mark.parametrize("asking", [Asking.ELSEWHERE, Asking.NEVER])
def test_who_must_not_wait_is_told_what_is_remembered(world: _Image, asking: Asking) -> None:
    world.ask()

    assert world.ask(asking=asking) == 1


@pytest.mark.parametrize(
    ("asking", "error"), [(Asking.ELSEWHERE, WouldWait), (Asking.NEVER, Exhausted)]
)
def test_who_must_not_wait_does_not_wait_for_a_query_under_way(
    world: _Image, asking: Asking, error: type[Exception]
) -> None:
    with _under_way(world), pytest.raises(error):
        world.ask(0.0, asking=asking)


@contextlib.contextmanager
def _under_way(world: _Image, image: Image = DISK) -> Iterator[None]:
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
    world: _Image, asking: Asking, error: type[Exception]
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


def _silent(world: _Image, image: Image = DISK) -> None:
    world.before = _raise(BackendTimeout("silent"))
    with pytest.raises(BackendTimeout):
        world.ask(0.0, image)


@pytest.mark.parametrize("asking", list(Asking))
def test_silence_is_remembered_for_a_second_by_all_who_ask(world: _Image, asking: Asking) -> None:
    _silent(world)
    world.seconds += 0.999

    with pytest.raises(BackendTimeout):
        world.ask(0.0, asking=asking)
    assert len(world.opened) == 1


def test_a_silent_server_is_asked_again_after_a_second(world: _Image) -> None:
    _silent(world)
    world.before = lambda: None
    world.seconds += MEMORY_SECONDS

    with pytest.raises(WouldWait):
        world.ask(asking=Asking.ELSEWHERE)
    assert world.ask(0.0) == 2
    assert world.ask(0.0) == 3


@pytest.mark.parametrize("asking", list(Asking))
def test_nobody_waits_while_a_silent_server_is_asked_again(world: _Image, asking: Asking) -> None:
    _silent(world)
    world.seconds += MEMORY_SECONDS
    with _under_way(world):
        with pytest.raises(BackendTimeout):
            world.ask(0.0, asking=asking)
        assert len(world.opened) == 2


def test_who_must_not_ask_is_told_of_an_old_silence(world: _Image) -> None:
    _silent(world)
    world.seconds += 1e6

    with pytest.raises(BackendTimeout):
        world.ask(0.0, asking=Asking.NEVER)


def test_a_new_server_is_not_taken_for_the_silent_one(world: _Image) -> None:
    _silent(world)
    world.before = lambda: None
    world.stamp = "second"

    assert world.ask(0.0) == 2


def test_only_a_few_silent_servers_are_asked_again_at_a_time(
    world: _Image, monkeypatch: pytest.MonkeyPatch
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


def test_a_server_that_fails_at_once_is_asked_each_time(world: _Image) -> None:
    world.before = _raise(BackendError("refused"))
    for _ in range(2):
        with pytest.raises(BackendError):
            world.ask(0.0)

    assert len(world.opened) == 2
