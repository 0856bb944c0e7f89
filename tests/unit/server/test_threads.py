# SPDX-License-Identifier: Apache-2.0
"""Threads that are made when needed, and what becomes of work where none is to be had."""

import threading
from collections.abc import Callable, Iterator

import pytest

from imageserver.server.threads import NoThread, Threads
from tests.unit.shortages import no_threads


class Gates:
    """Work that waits until it is let go."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._changed = threading.Condition()
        self._open: set[str] = set()

    def work(self, name: str) -> Callable[[], None]:
        def run() -> None:
            with self._changed:
                self._changed.wait_for(lambda: name in self._open, 10)
                self.done.append(name)
                self._changed.notify_all()

        return run

    def let(self, *names: str) -> None:
        with self._changed:
            self._open.update(names)
            self._changed.notify_all()

    def await_done(self, *names: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(self.done) == set(names), 10), self.done


@pytest.fixture
def gates() -> Iterator[Gates]:
    made = Gates()
    yield made
    made.let(*"abcdef")


def test_each_work_has_a_thread_up_to_the_most_then_it_waits(gates):
    threads = Threads("t", 2)
    for name in "abc":
        threads.submit(gates.work(name), may_wait=False)
    gates.let("a", "b", "c")
    gates.await_done("a", "b", "c")
    assert threads._count == 2


def test_a_thread_that_is_free_does_the_next_work(gates):
    threads = Threads("t", 2)
    gates.let("a", "b")
    threads.submit(gates.work("a"), may_wait=False)
    gates.await_done("a")
    while threads._unfinished:
        pass
    with no_threads():
        threads.submit(gates.work("b"), may_wait=False)
    gates.await_done("a", "b")


def test_work_that_found_no_thread_is_never_done(gates, caplog):
    threads = Threads("t", 2)
    gates.let("a", "b")
    with no_threads(), pytest.raises(NoThread):
        threads.submit(gates.work("a"), may_wait=True)
    assert "there is no thread for another t: can't start new thread" in caplog.text
    threads.submit(gates.work("b"), may_wait=True)
    gates.await_done("b")


def test_where_no_other_is_to_be_had_work_waits_for_a_thread_only_if_it_may(gates):
    threads = Threads("t", 3)
    threads.submit(gates.work("a"), may_wait=False)
    with no_threads():
        with pytest.raises(NoThread):
            threads.submit(gates.work("b"), may_wait=False)
        threads.submit(gates.work("c"), may_wait=True)
    gates.let("a", "b", "c")
    gates.await_done("a", "c")


def test_threads_made_in_advance_are_there_when_there_are_no_more(gates):
    threads = Threads("t", 2)
    threads.start()
    with no_threads():
        threads.submit(gates.work("a"), may_wait=False)
        threads.submit(gates.work("b"), may_wait=False)
    gates.let("a", "b")
    gates.await_done("a", "b")


def test_threads_that_cannot_be_made_in_advance_are_made_later(gates):
    threads = Threads("t", 2)
    with no_threads():
        threads.start()
    assert threads.is_short
    gates.let("a")
    threads.submit(gates.work("a"), may_wait=False)
    assert not threads.is_short
    gates.await_done("a")


def fail() -> None:
    raise ZeroDivisionError


def test_work_that_fails_takes_its_thread_along_and_another_one_comes(gates, monkeypatch):
    reported = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: reported.set())
    threads = Threads("t", 1)
    threads.submit(fail, may_wait=False)
    assert reported.wait(10)
    gates.let("a")
    threads.submit(gates.work("a"), may_wait=False)
    gates.await_done("a")
