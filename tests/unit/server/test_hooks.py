# SPDX-License-Identifier: Apache-2.0
"""What runs in gunicorn's master while it serves: hooks that stop nothing."""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from gunicorn.config import Config
from gunicorn.errors import HaltServer

from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind, WorkerState
from imageserver.runtime.slottable import SharedTable
from imageserver.server import hooks, master, preconditions
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
    preconditions.prepare(hooks.load_settings())
    die_holding_a_slot(place)

    hooks.child_exit(None, None)

    assert writers(place) == 0


def test_a_sweep_in_the_master_leaves_no_descriptor_behind() -> None:
    preconditions.prepare(hooks.load_settings())
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
    arbiter.reload()

    assert (waits, arbiter.cfg.graceful_timeout) == ([0], 605)


def _reload(arbiter: SimpleNamespace, reload: Callable[[], None]) -> None:
    arbiter.reload = reload
    hooks.on_starting(arbiter)
    arbiter.reload()


def _remove_runtime(place: Path, _patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(place / "run")


def _replace_runtime(place: Path, _patch: pytest.MonkeyPatch) -> None:
    (place / "run").rename(place / "away")
    (place / "run").mkdir(0o700)


def _open_config(place: Path, _patch: pytest.MonkeyPatch) -> None:
    (place / "transfers").chmod(0o777)


def _lose_owner(_place: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("IMAGESERVER_CONFIG_OWNERS", "somebody-whom-ldap-has-just-lost")


@pytest.mark.parametrize("spoil", [_remove_runtime, _replace_runtime, _open_config, _lose_owner])
def test_a_reload_that_could_not_start_workers_stops_none(
    place: Path,
    arbiter: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    reloads: list[str] = []
    arbiter.reload = lambda: reloads.append("reload")
    hooks.on_starting(arbiter)
    arbiter.reload()
    caplog.clear()
    spoil(place, monkeypatch)

    arbiter.reload()

    assert reloads == ["reload"]
    (record,) = caplog.records
    assert record.getMessage().startswith("reload refused, the workers go on: IMAGESERVER_")


def test_a_reload_does_not_mind_a_table_that_is_damaged_for_a_moment(
    place: Path, arbiter: SimpleNamespace
) -> None:
    reloads: list[str] = []
    arbiter.reload = lambda: reloads.append("reload")
    hooks.on_starting(arbiter)
    with (place / "run" / "slots").open("r+b") as file:
        file.write(bytes(64))

    arbiter.reload()

    assert reloads == ["reload"]


@pytest.mark.parametrize("error", [SystemExit(1), RuntimeError("bug"), OSError(12, "no memory")])
def test_a_reload_that_fails_half_way_leaves_the_master_as_it_was(
    arbiter: SimpleNamespace, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    before = arbiter.cfg

    def fail() -> None:
        arbiter.app.cfg = Config()  # what gunicorn does first
        raise error

    _reload(arbiter, fail)

    assert (arbiter.app.cfg, arbiter.cfg) == (before, before)
    assert caplog.records[-1].getMessage() == "reload failed, the workers go on"


def test_a_certificate_that_does_not_fit_leaves_the_old_one_and_the_reload_goes_on(
    arbiter: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks.on_starting(arbiter)
    arbiter.tls = old = object()
    monkeypatch.setenv("IMAGESERVER_TLS_CERT", "/nowhere")

    hooks.on_reload(arbiter)

    assert arbiter.tls is old


# What cannot begin


def test_a_worker_that_cannot_be_forked_is_waited_for(
    arbiter: SimpleNamespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(master.time, "monotonic", lambda: now)
    monkeypatch.setattr(master.time, "sleep", lambda _: None)

    def no_process() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    arbiter.spawn_worker = no_process
    hooks.on_starting(arbiter)
    arbiter.num_workers = 2
    for _ in range(3):
        arbiter.manage_workers()
    now += 1.0
    arbiter.manage_workers()

    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told == 2 * [
        "no worker could be started, trying again: [Errno 11] Resource temporarily unavailable"
    ]


@pytest.mark.parametrize("others_accept", [True, False])
def test_a_worker_that_cannot_boot_ends_a_server_only_where_no_other_serves(
    place: Path, arbiter: SimpleNamespace, others_accept: bool
) -> None:
    failures: list[BaseException] = [HaltServer("Worker failed to boot.", 3)]

    def reap() -> None:
        if failures:
            raise failures.pop()

    arbiter.reap_workers = reap
    hooks.on_starting(arbiter)
    table = SharedTable(str(place / "run"), {})
    row = table.claim(Kind.WORKER, Ticket("", "worker", "", ""))
    state = WorkerState.ACCEPTING if others_accept else WorkerState.BOOTING
    row.progress(0, state.value)
    arbiter.WORKERS = {os.getpid(): None}
    try:
        arbiter.reap_workers()
        assert others_accept
    except HaltServer:
        assert not others_accept
    finally:
        table.close()


def test_an_upgrade_without_its_runtime_directory_does_not_begin(
    place: Path, arbiter: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    upgrades: list[str] = []
    arbiter.reexec = lambda: upgrades.append("upgrade")
    hooks.on_starting(arbiter)
    arbiter.reexec()
    shutil.rmtree(place / "run")
    arbiter.reexec()

    assert upgrades == ["upgrade"]
    assert caplog.records[-1].getMessage() == (
        f"upgrade refused: IMAGESERVER_RUNTIME_DIR: {place}/run was removed or replaced; "
        "restart the server"
    )


def test_an_upgrade_that_cannot_begin_ends_its_own_process_only(
    arbiter: SimpleNamespace,
) -> None:
    children: list[int] = []

    def fail_in_a_copy() -> None:
        child = os.fork()
        if child == 0:
            raise FileNotFoundError(2, "the working directory was removed")
        children.append(child)

    arbiter.reexec = fail_in_a_copy
    hooks.on_starting(arbiter)
    arbiter.reexec()

    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


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
