# SPDX-License-Identifier: Apache-2.0
"""What must hold before the master binds: else it ends with a sentence."""

import contextlib
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imageserver.core import slots
from imageserver.runtime import tablefile
from imageserver.runtime.private import open_private
from imageserver.server import startup
from imageserver.server.arbiter import ImageArbiter
from imageserver.server.preconditions import CannotStart, check
from imageserver.settings import Settings
from tests.system.skips import needs
from tests.unit.masters import (
    begin,
    die_holding_a_slot,
    prepared,
    writers,
)

pytestmark = pytest.mark.usefixtures("place")


# Checks


def test_directories_that_can_be_used_pass_without_a_word(place: Path) -> None:
    assert check(startup.read_settings()) == []
    prepared()
    assert {path.name for path in (place / "run").iterdir()} >= {"locks", "slots"}
    assert check(startup.read_settings()) == []


def test_a_missing_config_directory_is_a_warning(place: Path) -> None:
    (place / "transfers").rmdir()

    (warning,) = check(startup.read_settings())
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
        check(startup.read_settings())


def test_another_version_that_still_runs_is_a_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tablefile, "_MEND_SECONDS", 0)
    (place / "run").mkdir(0o700)
    (place / "run" / "slots").write_bytes(bytes(slots.SIZE))
    user = open_private(str(place / "run"), "slots.use")
    fcntl.flock(user, fcntl.LOCK_SH)

    try:
        with pytest.raises(CannotStart, match=r"another version of this server that still runs"):
            check(startup.read_settings())
    finally:
        os.close(user)


def test_a_missing_libnbd_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)

    with pytest.raises(CannotStart, match="install the package python3-libnbd"):
        check(startup.read_settings())


def test_a_wrong_setting_ends_the_process_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGESERVER_WORKERS", "many")

    with pytest.raises(SystemExit, match=r"^imageserver: IMAGESERVER_WORKERS='many' is wrong: "):
        startup.read_settings()


# Starting


def test_starting_frees_what_the_dead_held_and_prunes_idle_locks(
    place: Path, arbiter: ImageArbiter
) -> None:
    prepared()
    die_holding_a_slot(place)
    (place / "run" / "locks" / "idle.lock").touch()
    os.utime(place / "run" / "locks" / "idle.lock", (0, 0))

    begin(arbiter)

    assert writers(place) == 0
    assert list((place / "run" / "locks").iterdir()) == []


def test_a_failed_check_ends_the_start(place: Path, arbiter: ImageArbiter) -> None:
    _open_to_all(place)

    with pytest.raises(SystemExit, match=r"^imageserver: IMAGESERVER_CONFIG_DIR: "):
        begin(arbiter)


def test_warnings_of_the_check_are_logged(
    place: Path, arbiter: ImageArbiter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "imageserver")
    (place / "transfers").rmdir()

    begin(arbiter)

    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.fixture
def taken() -> Iterator[str]:
    """An address where somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_an_address_that_is_taken_ends_the_start_by_name(taken: str, place: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        startup.require_free_addresses(Settings(bind=(f"unix:{place}/x", taken), admin_bind=()))

    assert str(raised.value) == (
        f"imageserver: IMAGESERVER_BIND: {taken} cannot be used (Address already in use); "
        "stop what listens there or choose another address."
    )


def test_a_port_that_an_outgoing_connection_has_is_said_to_be_that() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as outgoing,
    ):
        address = f"127.0.0.1:{outgoing.getsockname()[1]}"
        with pytest.raises(SystemExit) as raised:
            startup.require_free_addresses(Settings(bind=(address,), admin_bind=()))

    assert str(raised.value) == (
        f"imageserver: IMAGESERVER_BIND: {address} cannot be used (Address already in use); "
        "an outgoing connection of this host has taken the port; wait until it has ended, and "
        "reserve the port: sysctl net.ipv4.ip_local_reserved_ports."
    )


@pytest.mark.parametrize(
    ("variables", "is_ours"),
    [
        ({"GUNICORN_FD": "3", "GUNICORN_PID": "1"}, True),
        ({"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}, True),
        ({"GUNICORN_FD": "3"}, False),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "1"}, False),
    ],
)
def test_inherited_sockets_are_not_checked(
    taken: str, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_ours: bool
) -> None:
    """Those that were meant for another process are not inherited."""
    for variable, text in variables.items():
        monkeypatch.setenv(variable, text)

    with contextlib.nullcontext() if is_ours else pytest.raises(SystemExit, match="in use"):
        startup.require_free_addresses(Settings(bind=(taken,), admin_bind=()))


def test_the_check_leaves_an_address_free(taken: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    startup.require_free_addresses(Settings(bind=(address,), admin_bind=()))
    startup.require_free_addresses(Settings(bind=(address,), admin_bind=()))


@needs("IPv6")
def test_ipv6_addresses_are_checked_too() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        address = f"[::1]:{listener.getsockname()[1]}"

        with pytest.raises(SystemExit):
            startup.require_free_addresses(Settings(bind=(address,), admin_bind=()))


@needs("IPv6")
def test_an_address_that_another_takes_along_ends_the_start() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    with pytest.raises(SystemExit, match=f"IMAGESERVER_BIND: 127.0.0.1:{port} cannot be used"):
        startup.require_free_addresses(
            Settings(bind=(f"[::]:{port}", f"127.0.0.1:{port}"), admin_bind=())
        )


def test_sockets_of_systemd_that_are_not_the_settings_end_the_start(
    arbiter: ImageArbiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_FDS", "0")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))

    with pytest.raises(SystemExit, match=r"^imageserver: systemd has passed .* agree\.$"):
        begin(arbiter)
