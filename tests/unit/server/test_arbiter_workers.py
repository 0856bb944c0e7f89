# SPDX-License-Identifier: Apache-2.0
"""The master and its workers: who counts, who is ended, and what is left at the end."""

import itertools
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from gunicorn.arbiter import Arbiter

from imageserver.server import addresses
from imageserver.server.arbiter import ImageArbiter
from tests.unit.masters import begin

pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def heartbeats() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The files of a worker that serves, and of one that drains."""
    with tempfile.TemporaryFile() as serving, tempfile.TemporaryFile() as draining:
        draining.truncate(1)
        yield serving, draining


def test_workers_told_to_stop_do_not_count(
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    heartbeats: tuple[IO[bytes], IO[bytes]],
) -> None:
    told = []

    tmp, drains = heartbeats

    def spawn(arbiter: ImageArbiter = arbiter) -> None:
        age = len(arbiter.WORKERS)
        arbiter.WORKERS[age] = SimpleNamespace(pid=age, age=age, tmp=tmp)

    monkeypatch.setattr(Arbiter, "spawn_worker", spawn)
    monkeypatch.setattr(Arbiter, "kill_worker", lambda _, pid, sig: told.append((pid, sig)))
    begin(arbiter)

    arbiter._num_workers = 2
    arbiter.manage_workers()
    spawn()
    spawn()
    arbiter.manage_workers()  # as in a reload: the older ones go
    arbiter.manage_workers()  # and are told so once
    assert told == [(0, signal.SIGTERM), (1, signal.SIGTERM)]
    del arbiter.WORKERS[2], arbiter.WORKERS[3]  # the new ones die
    arbiter.manage_workers()
    assert sorted(arbiter.WORKERS) == [0, 1, 2, 3]
    arbiter.kill_worker(3, signal.SIGUSR1)
    arbiter.manage_workers()
    arbiter._num_workers = 1
    arbiter.manage_workers()
    assert told[2:] == [(3, signal.SIGUSR1), (2, signal.SIGTERM)]
    arbiter.WORKERS[3].tmp = drains  # somebody else has told it to stop
    arbiter.manage_workers()
    assert sorted(arbiter.WORKERS) == [0, 1, 2, 3, 4]


def test_workers_that_stood_still_with_their_master_are_not_ended(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    now = 1000.0
    monkeypatch.setattr(Arbiter, "murder_workers", lambda _: looks.append(now))
    monkeypatch.setattr(time, "monotonic", lambda: now)
    begin(arbiter)
    for moment in (1000.0, 1001.0, 1100.0, 1105.0, 1111.0):
        now = moment
        arbiter.murder_workers()

    assert looks == [1000.0, 1001.0, 1111.0]


@pytest.mark.parametrize("fate", ["kept", "removed", "replaced"])
def test_a_stop_removes_the_files_of_its_own_sockets_only(
    place: Path, arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    path = str(place / "socket")
    monkeypatch.setattr(arbiter, "WORKERS", {})
    begin(arbiter)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(path)
        arbiter.LISTENERS = [listener]
        arbiter._sockets = addresses.files_of(arbiter.LISTENERS)
        if fate != "kept":
            os.unlink(path)
        if fate == "replaced":
            other.bind(path)
        arbiter.stop()

    assert (arbiter.LISTENERS, os.path.exists(path)) == ([], fate == "replaced")


def test_a_socket_whose_file_is_gone_keeps_no_successor_from_starting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        os.unlink(tmp_path / "socket")
        assert addresses.files_of([listener]) == {}

    assert [record.getMessage() for record in caplog.records] == [
        f"nobody can connect to {tmp_path}/socket: No such file or directory"
    ]


def test_workers_that_do_not_end_at_once_are_killed_whatever_the_drain_may_take(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is stopped. gunicorn would wait for all of the drain timeout."""
    told: list[int] = []
    monkeypatch.setattr("imageserver.server.arbiter._QUICK_SECONDS", 0.2)
    monkeypatch.setattr(Arbiter, "reap_workers", lambda _: None)
    monkeypatch.setattr(Arbiter, "kill_workers", lambda _, number: told.append(number))
    begin(arbiter)
    arbiter.WORKERS, arbiter.LISTENERS = {1: None}, []
    for graceful in (False, True):
        arbiter.SIG_QUEUE.put(signal.SIGINT)
        arbiter.stop(graceful)

    ends = [signal.SIGQUIT, signal.SIGKILL]
    assert told == [*ends, signal.SIGTERM, *ends]


def test_a_clock_that_is_set_cuts_nothing_that_drains(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(({1: None}, {1: None}, {}, {}))
    told: list[tuple[int, int]] = []

    def reap(arbiter: ImageArbiter) -> None:
        arbiter.WORKERS = next(turns)

    begin(arbiter)
    monkeypatch.setattr(Arbiter, "reap_workers", reap)
    monkeypatch.setattr(
        Arbiter, "kill_workers", lambda arbiter, number: told.append((number, len(arbiter.WORKERS)))
    )
    monkeypatch.setattr(time, "time", itertools.count(0, 10**6).__next__)
    monkeypatch.setattr(arbiter, "cfg", SimpleNamespace(graceful_timeout=60))
    arbiter.WORKERS, arbiter.LISTENERS = {1: None}, []
    arbiter.stop()

    assert told == [(signal.SIGTERM, 1), (signal.SIGKILL, 0)]
