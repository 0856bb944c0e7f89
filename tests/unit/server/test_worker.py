# SPDX-License-Identifier: Apache-2.0
"""A worker whose master lives, or died in the moment of the fork."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from imageserver.server.worker import ImageWorker
from tests.unit.shortages import open_descriptors


def _worker(ppid: int) -> ImageWorker:
    worker = ImageWorker.__new__(ImageWorker)
    watched: list[int] = []
    worker.__dict__.update(
        ppid=ppid,
        pid=os.getpid(),
        alive=True,
        _loop=SimpleNamespace(watch=lambda fd, _: watched.append(fd), watched=watched),
    )
    return worker


def test_a_worker_watches_the_master_that_has_forked_it() -> None:
    worker = _worker(os.getppid())

    worker._watch_master()

    (master,) = worker._loop.watched
    os.close(master)
    assert worker.alive


def test_a_worker_whose_master_died_during_the_fork_drains_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(10)
    worker = _worker(child.pid)

    worker._watch_master()

    assert not worker.alive
    assert "master died" in caplog.text


def test_another_process_with_the_pid_of_a_dead_master_is_not_taken_for_it() -> None:
    before = open_descriptors()
    worker = _worker(os.getpid())

    worker._watch_master()

    assert not worker.alive
    assert (worker._loop.watched, open_descriptors()) == ([], before)
