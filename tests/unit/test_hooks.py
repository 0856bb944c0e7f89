# SPDX-License-Identifier: Apache-2.0
"""What runs in gunicorn's master: checks that end in a sentence, and hooks that stop nothing."""

import logging
import os
import queue
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from imageserver import shared, slots
from imageserver.private import open_private
from imageserver.server import hooks
from imageserver.server.hooks import CannotStart
from imageserver.server.worker import ImageWorker
from imageserver.settings import Settings
from imageserver.shared import SharedTable
from imageserver.slots import Kind

_HOLD = """
import sys
from imageserver.ports import Ticket
from imageserver.shared import SharedTable
from imageserver.slots import Kind
SharedTable(sys.argv[1], {Kind.WRITE: 1}).claim(Kind.WRITE, Ticket("t", "write", "", ""))
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the settings to directories of our own; leave the log alone."""
    (tmp_path / "transfers").mkdir(0o755)
    (tmp_path / "transfers").chmod(0o755)
    for name in ("GUNICORN_FD", "LISTEN_FDS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("IMAGESERVER_CONFIG_DIR", str(tmp_path / "transfers"))
    monkeypatch.setenv("IMAGESERVER_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("IMAGESERVER_BIND", f"unix:{tmp_path}/socket")
    monkeypatch.setenv("IMAGESERVER_ADMIN_BIND", "none")
    monkeypatch.setattr(hooks.logs, "configure", lambda *_: None)
    return tmp_path


@pytest.fixture
def arbiter() -> SimpleNamespace:
    """Return as much of a master as the hooks know."""
    return SimpleNamespace(
        cfg=Config(),
        reload=lambda: None,
        stop=lambda _graceful: None,
        kill_worker=lambda _pid, _number: None,
        WORKERS={},
        worker_class=ImageWorker,
        SIG_QUEUE=queue.SimpleQueue(),
        systemd=False,
        tls=None,
    )


def _table(place: Path) -> SharedTable:
    return SharedTable(str(place / "run"), {Kind.WRITE: 1})


def _die_holding_a_slot(place: Path) -> None:
    subprocess.run([sys.executable, "-c", _HOLD, str(place / "run")], check=True, timeout=30)


# Checks


def test_directories_that_can_be_used_pass_without_a_word(place: Path) -> None:
    assert hooks.check(hooks.load_settings()) == []
    assert {path.name for path in (place / "run").iterdir()} >= {"locks", "slots"}


def test_a_missing_config_directory_is_a_warning(place: Path) -> None:
    (place / "transfers").rmdir()

    (warning,) = hooks.check(hooks.load_settings())
    assert warning == (
        f"config directory {place}/transfers does not exist yet: no transfer is known"
    )


def _open_to_all(place: Path) -> None:
    (place / "transfers").chmod(0o777)


def _no_directory(place: Path) -> None:
    (place / "transfers").rmdir()
    (place / "transfers").touch()


def _runtime_is_a_file(place: Path) -> None:
    (place / "run").touch()


def _locks_is_a_file(place: Path) -> None:
    (place / "run").mkdir(0o700)
    (place / "run" / "locks").touch()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_open_to_all, r"IMAGESERVER_CONFIG_DIR: .* by group or others \(mode 0777\); chown it "),
        (_no_directory, r"IMAGESERVER_CONFIG_DIR=.* cannot be used: Not a directory\."),
        (_runtime_is_a_file, r"IMAGESERVER_RUNTIME_DIR: .*/run is not a directory .*\."),
        (_locks_is_a_file, r"IMAGESERVER_RUNTIME_DIR: .*/run/locks is not a directory .*\."),
    ],
)
def test_a_directory_that_cannot_be_used_is_a_sentence(
    place: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(place)

    with pytest.raises(CannotStart, match=f"^{sentence}"):
        hooks.check(hooks.load_settings())


def test_another_version_that_still_runs_is_a_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_MEND_SECONDS", 0)
    (place / "run").mkdir(0o700)
    (place / "run" / "slots").write_bytes(bytes(slots.SIZE))
    user = open_private(str(place / "run"), "slots.use")
    shared.fcntl.flock(user, shared.fcntl.LOCK_SH)

    try:
        with pytest.raises(CannotStart, match=r"another version of this server that still runs"):
            hooks.check(hooks.load_settings())
    finally:
        os.close(user)


def test_a_missing_libnbd_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)

    with pytest.raises(CannotStart, match="install the package python3-libnbd"):
        hooks.check(hooks.load_settings())


def test_a_wrong_setting_ends_the_process_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGESERVER_WORKERS", "many")

    with pytest.raises(SystemExit, match=r"^imageserver: IMAGESERVER_WORKERS='many' is wrong: "):
        hooks.load_settings()


# Starting


def test_starting_frees_what_the_dead_held_and_prunes_idle_locks(
    place: Path, arbiter: SimpleNamespace
) -> None:
    hooks.check(hooks.load_settings())
    _die_holding_a_slot(place)
    (place / "run" / "locks" / "idle.lock").touch()
    os.utime(place / "run" / "locks" / "idle.lock", (0, 0))

    hooks.on_starting(arbiter)

    assert _table(place).count(Kind.WRITE) == 0
    assert list((place / "run" / "locks").iterdir()) == []


def test_a_failed_check_ends_the_start(place: Path, arbiter: SimpleNamespace) -> None:
    _open_to_all(place)

    with pytest.raises(SystemExit, match=r"^imageserver: IMAGESERVER_CONFIG_DIR: "):
        hooks.on_starting(arbiter)


def test_warnings_of_the_check_are_logged(
    place: Path, arbiter: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "imageserver")
    (place / "transfers").rmdir()

    hooks.on_starting(arbiter)

    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.fixture
def taken() -> Iterator[str]:
    """An address where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_an_address_that_is_taken_ends_the_start_by_name(taken: str, place: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        hooks._check_addresses(Settings(bind=(f"unix:{place}/x", taken), admin_bind=()))

    assert str(raised.value) == (
        f"imageserver: IMAGESERVER_BIND: {taken} cannot be used (Address already in use); "
        "stop what listens there or choose another address."
    )


@pytest.mark.parametrize("variable", ["GUNICORN_FD", "LISTEN_FDS"])
def test_inherited_sockets_are_not_checked(
    taken: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "3")

    hooks._check_addresses(Settings(bind=(taken,), admin_bind=()))


def test_the_check_leaves_an_address_free(taken: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    hooks._check_addresses(Settings(bind=(address,), admin_bind=()))
    hooks._check_addresses(Settings(bind=(address,), admin_bind=()))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_addresses_are_checked_too() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        address = f"[::1]:{listener.getsockname()[1]}"

        with pytest.raises(SystemExit):
            hooks._check_addresses(Settings(bind=(address,), admin_bind=()))


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_address_that_another_takes_along_ends_the_start() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    with pytest.raises(SystemExit, match=f"IMAGESERVER_BIND: 127.0.0.1:{port} cannot be used"):
        hooks._check_addresses(Settings(bind=(f"[::]:{port}", f"127.0.0.1:{port}"), admin_bind=()))


def test_sockets_of_systemd_that_are_not_the_settings_end_the_start(
    arbiter: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "0")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))

    with pytest.raises(SystemExit, match=r"^imageserver: systemd has passed .* agree\.$"):
        hooks.on_starting(arbiter)


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
    _die_holding_a_slot(place)

    hooks.child_exit(None, None)

    assert _table(place).count(Kind.WRITE) == 0


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
