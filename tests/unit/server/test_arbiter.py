# SPDX-License-Identifier: Apache-2.0
"""The master while it serves: nothing that fails to begin stops it."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer

from imageserver.backends.file.kind import FileImage
from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer
from imageserver.core.workers import WorkerState
from imageserver.runtime.slottable import SharedTable
from imageserver.server import arbiter as master
from imageserver.server.arbiter import ImageArbiter
from imageserver.server.worker import STOPPING, ImageWorker
from tests.unit.masters import begin, die_holding_a_slot, writers
from tests.unit.shortages import open_descriptors

pytestmark = pytest.mark.usefixtures("place")


# An upgrade


def test_an_upgrade_runs_what_a_link_leads_to_by_then(
    tmp_path: Path, arbiter: ImageArbiter
) -> None:
    home = tmp_path / "current"
    home.mkdir()
    (home / "gunicorn.conf.py").touch()
    command = [f"{home}/bin/gunicorn", "--preload"]
    context = {0: "/old/bin/python", "args": ["/old/bin/python", *command], "cwd": "/old"}
    arbiter.START_CTX = context

    arbiter.run_command_again()

    assert context == {0: command[0], "args": command, "cwd": str(home)}


def test_an_upgrade_elsewhere_runs_what_it_ran(arbiter: ImageArbiter) -> None:
    context = {0: "/venv/bin/python", "args": ["/venv/bin/python", "gunicorn"], "cwd": "/here"}
    arbiter.START_CTX = dict(context)

    arbiter.run_command_again()

    assert context == arbiter.START_CTX


# A worker's exit


def test_what_a_dead_worker_held_is_free_at_once(place: Path, arbiter: ImageArbiter) -> None:
    begin(arbiter)
    die_holding_a_slot(place)

    arbiter.free_slots(None)

    assert writers(place) == 0


def test_a_sweep_in_the_master_leaves_no_descriptor_behind(arbiter: ImageArbiter) -> None:
    begin(arbiter)
    before = open_descriptors()

    arbiter.free_slots(None)

    assert open_descriptors() == before


def test_a_sweep_that_fails_is_logged_and_stops_nothing(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError(5, "Input/output error")

    begin(arbiter)
    caplog.clear()
    monkeypatch.setattr(arbiter.process.slots, "sweep", fail)

    arbiter.free_slots(None)

    assert [record.getMessage() for record in caplog.records] == [
        "sweep after a worker's exit failed"
    ]


# The end


@pytest.mark.parametrize(
    ("keep", "status", "heir", "stays"),
    [
        ("no", 0, 0, 0),
        ("yes", 0, 0, 1),
        ("no", 3, 0, 1),
        ("no", 0, 4711, 1),
    ],
    ids=["forgotten", "kept", "workers did not boot", "upgrade"],
)
def test_registered_transfers_end_with_a_server_that_was_told_to(
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    keep: str,
    status: int,
    heir: int,
    stays: int,
) -> None:
    def halt(arbiter: ImageArbiter, _reason: str | None, _status: int) -> None:
        arbiter.stop()

    monkeypatch.setattr(Arbiter, "halt", halt)
    monkeypatch.setattr(Arbiter, "stop", lambda *_: None)
    monkeypatch.setenv("IMAGESERVER_KEEP_REGISTRATIONS", keep)
    begin(arbiter)
    registrations = arbiter.process.registrations
    registrations.store(Transfer("x", FileImage("/x"), idle_seconds=60))
    arbiter.reexec_pid = heir

    arbiter.stop()  # of SIGINT, before its end
    assert registrations.count() == 1
    arbiter.halt(exit_status=status)
    assert registrations.count() == stays


def test_transfers_that_cannot_be_forgotten_do_not_keep_the_server(
    place: Path,
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Arbiter, "halt", lambda arbiter, *_: arbiter.stop())
    monkeypatch.setattr(Arbiter, "stop", lambda *_: None)
    monkeypatch.setenv("IMAGESERVER_KEEP_REGISTRATIONS", "no")
    begin(arbiter)
    shutil.rmtree(place / "run")

    arbiter.halt()

    assert caplog.records[-1].getMessage().startswith("registered transfers stay: ")


# What cannot begin


def test_a_worker_that_cannot_be_forked_is_waited_for(
    arbiter: ImageArbiter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(master.time, "monotonic", lambda: now)
    monkeypatch.setattr(master.time, "sleep", lambda _: None)

    def no_process(_arbiter: ImageArbiter) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(Arbiter, "spawn_worker", no_process)
    begin(arbiter)
    arbiter._num_workers = 2
    for _ in range(3):
        arbiter.manage_workers()
    now += 1.0
    arbiter.manage_workers()

    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert told == 2 * [
        "no worker could be started, trying again: [Errno 11] Resource temporarily unavailable"
    ]


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("others_accept", [True, False])
def test_a_worker_that_cannot_boot_ends_a_server_only_where_no_other_serves(
    place: Path,
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    others_accept: bool,
    is_old: bool,
) -> None:
    """A server that has replaced workers has served, and may do so again."""
    failures: list[BaseException] = [HaltServer("Worker failed to boot.", 3)]

    def reap(_arbiter: ImageArbiter) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(Arbiter, "reap_workers", reap)
    begin(arbiter)
    table = SharedTable(str(place / "run"), {})
    row = table.claim(Kind.WORKER, Ticket("", "worker", "", ""))
    state = WorkerState.ACCEPTING if others_accept else WorkerState.BOOTING
    row.progress(0, state.value)
    arbiter.WORKERS = {os.getpid(): None}
    arbiter._num_workers, arbiter.worker_age = 2, 2 + is_old
    try:
        arbiter.reap_workers()
        assert others_accept or is_old
    except HaltServer:
        assert not others_accept
        assert not is_old
    finally:
        table.close()


def test_an_upgrade_without_its_runtime_directory_does_not_begin(
    place: Path,
    arbiter: ImageArbiter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    upgrades: list[str] = []
    monkeypatch.setattr(Arbiter, "reexec", lambda _: upgrades.append("upgrade"))
    begin(arbiter)
    arbiter.reexec()
    shutil.rmtree(place / "run")
    arbiter.reexec()

    assert upgrades == ["upgrade"]
    assert caplog.records[-1].getMessage() == (
        f"upgrade refused: IMAGESERVER_RUNTIME_DIR: {place}/run was removed or replaced; "
        "restart the server"
    )


def test_an_upgrade_that_cannot_begin_ends_its_own_process_only(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []

    def fail_in_a_copy(_arbiter: ImageArbiter) -> None:
        child = os.fork()
        if child == 0:
            raise FileNotFoundError(2, "the working directory was removed")
        children.append(child)

    monkeypatch.setattr(Arbiter, "reexec", fail_in_a_copy)
    begin(arbiter)
    arbiter.reexec()

    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


# A new worker


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put the signal handlers back that a worker takes over."""
    signals = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT)
    before = [signal.getsignal(number) for number in signals]
    yield
    for number, handler in zip(signals, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", sorted(STOPPING), ids=lambda number: number.name)
def test_a_worker_heeds_a_signal_that_comes_as_it_is_forked(
    arbiter: ImageArbiter, handlers: None, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    worker = ImageWorker.__new__(ImageWorker)
    worker.alive = True
    begin(arbiter)

    def spawn(_: Arbiter) -> int:
        """Fork; the child is told to stop before it has executed anything."""
        pid = os.fork()
        if pid:
            os.kill(pid, number)
            return pid
        try:
            arbiter.equip(worker)
            deadline = time.monotonic() + 5
            while worker.alive and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
            os._exit(worker.alive)

    monkeypatch.setattr(Arbiter, "spawn_worker", spawn)
    ends = [os.waitpid(arbiter.spawn_worker(), 0)[1] for _ in range(20)]

    assert [os.waitstatus_to_exitcode(end) for end in ends] == [0] * 20
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & STOPPING


def test_a_worker_is_equipped_with_what_the_master_has_read(
    arbiter: ImageArbiter, handlers: None
) -> None:
    worker = ImageWorker.__new__(ImageWorker)
    begin(arbiter)

    arbiter.equip(worker)

    assert worker.settings is arbiter.settings
    assert signal.getsignal(signal.SIGTERM) == worker.handle_exit


def test_a_worker_of_another_class_is_left_alone(arbiter: ImageArbiter) -> None:
    before = signal.getsignal(signal.SIGTERM)

    arbiter.equip(SimpleNamespace())

    assert signal.getsignal(signal.SIGTERM) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & STOPPING
