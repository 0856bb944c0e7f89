# SPDX-License-Identifier: Apache-2.0
"""What runs in gunicorn's master while it serves: hooks that stop nothing."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from imageserver.server import hooks
from imageserver.server.worker import ImageWorker
from tests.unit.masters import die_holding_a_slot, new_arbiter, settle, writers


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


@pytest.fixture
def arbiter() -> SimpleNamespace:
    return new_arbiter()


# An upgrade


def test_an_upgrade_runs_what_a_link_leads_to_by_then(
    tmp_path: Path, arbiter: SimpleNamespace
) -> None:
    home = tmp_path / "current"
    home.mkdir()
    (home / "gunicorn.conf.py").touch()
    command = [f"{home}/bin/gunicorn", "--preload"]
    context = {0: "/old/bin/python", "args": ["/old/bin/python", *command], "cwd": "/old"}
    arbiter.START_CTX = context

    hooks.pre_exec(arbiter)

    assert context == {0: command[0], "args": command, "cwd": str(home)}


def test_an_upgrade_elsewhere_runs_what_it_ran(arbiter: SimpleNamespace) -> None:
    context = {0: "/venv/bin/python", "args": ["/venv/bin/python", "gunicorn"], "cwd": "/here"}
    arbiter.START_CTX = dict(context)

    hooks.pre_exec(arbiter)

    assert context == arbiter.START_CTX


# A worker's exit


def test_what_a_dead_worker_held_is_free_at_once(place: Path) -> None:
    hooks.check(hooks.load_settings())
    die_holding_a_slot(place)

    hooks.child_exit(None, None)

    assert writers(place) == 0


def test_the_master_keeps_no_descriptor_of_the_table() -> None:
    hooks.check(hooks.load_settings())
    hooks.child_exit(None, None)  # opens the files of counts
    before = os.listdir("/proc/self/fd")

    hooks.child_exit(None, None)

    assert os.listdir("/proc/self/fd") == before


def test_a_sweep_that_fails_is_logged_and_stops_nothing(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "imageserver")
    (place / "run").touch()

    hooks.child_exit(None, None)

    assert [record.getMessage() for record in caplog.records] == [
        "sweep after a worker's exit failed"
    ]


def test_settings_that_no_longer_parse_stop_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "imageserver")
    monkeypatch.setenv("IMAGESERVER_CONFIG_OWNERS", "somebody-whom-ldap-has-just-lost")

    hooks.child_exit(None, None)

    assert [record.getMessage() for record in caplog.records] == [
        "sweep after a worker's exit failed"
    ]


# A reload


@pytest.mark.parametrize("fails", [False, True])
def test_a_reload_does_not_wait_and_leaves_the_timeout_as_it_was(
    arbiter: SimpleNamespace, fails: bool
) -> None:
    waits = []

    def reload() -> None:
        hooks.on_reload(arbiter)
        waits.append(arbiter.cfg.graceful_timeout)
        if fails:
            raise RuntimeError("bug")

    arbiter.reload = reload
    arbiter.cfg.set("graceful_timeout", 605)
    hooks.on_starting(arbiter)
    try:
        arbiter.reload()
    except RuntimeError:
        assert fails

    assert (waits, arbiter.cfg.graceful_timeout) == ([0], 605)


def test_workers_told_to_stop_do_not_count(arbiter: SimpleNamespace) -> None:
    told = []

    def spawn() -> None:
        age = len(arbiter.WORKERS)
        arbiter.WORKERS[age] = SimpleNamespace(pid=age, age=age)

    arbiter.spawn_worker = spawn
    arbiter.kill_worker = lambda pid, number: told.append((pid, number))
    hooks.on_starting(arbiter)

    arbiter.num_workers = 2
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
    arbiter.num_workers = 1
    arbiter.manage_workers()
    assert told[2:] == [(3, signal.SIGUSR1), (2, signal.SIGTERM)]


# A new worker


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the signal handlers back that a worker takes over."""
    signals = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
    before = [signal.getsignal(number) for number in signals]
    yield
    for number, handler in zip(signals, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("pending", "alive"),
    [
        pytest.param([], True, id="none"),
        pytest.param([signal.SIGTERM], False, id="term"),
        pytest.param([signal.SIGCHLD, signal.SIGINT], False, id="int-among-others"),
        pytest.param([signal.SIGCHLD, signal.SIGHUP], True, id="others"),
    ],
)
def test_a_worker_heeds_signals_that_came_before_it_could(
    arbiter: SimpleNamespace, handlers: None, pending: list[signal.Signals], alive: bool
) -> None:
    worker = ImageWorker.__new__(ImageWorker)
    worker.alive = True
    for number in pending:
        arbiter.SIG_QUEUE.put_nowait(number)

    hooks.post_fork(arbiter, worker)

    assert (worker.alive, arbiter.SIG_QUEUE.empty()) == (alive, True)
    assert signal.getsignal(signal.SIGTERM) == worker.handle_exit


def test_a_worker_of_another_class_is_left_alone(arbiter: SimpleNamespace) -> None:
    before = signal.getsignal(signal.SIGTERM)

    hooks.post_fork(arbiter, SimpleNamespace())

    assert signal.getsignal(signal.SIGTERM) == before
