# SPDX-License-Identifier: Apache-2.0
"""Addresses of the admin listener: which cannot be used, and none is lost to a restart."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.harness import ROOT, Server, free_port, wait_until
from tests.system.killing import end
from tests.system.watching import Admin, watched


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin, unix: Admin, big: dict[str, str]) -> Iterator[Server]:
    with watched(workplace, big, tcp, unix) as running:
        yield running


# Starting


def refused(server: Server) -> str:
    """Start a server that must refuse to; return its sentence."""
    done = subprocess.run(
        server.command, cwd=ROOT, env=server.env, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line and "[INFO]" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_an_address_that_is_taken_is_told_in_one_sentence(server, home, tcp):
    assert refused(Server(home, admin_bind=tcp.bind)) == (
        f"imageserver: IMAGESERVER_ADMIN_BIND: {tcp.bind} cannot be used (Address already in "
        "use); stop what listens there or choose another address."
    )


def test_a_socket_that_another_server_listens_at_is_told_in_one_sentence(server, home, unix):
    assert refused(Server(home, admin_bind=unix.bind)) == (
        f"imageserver: IMAGESERVER_ADMIN_BIND: another server listens at {unix.place}; "
        "stop it first."
    )
    assert unix.ask("/healthz").status == 200


def test_an_address_of_images_is_told_in_one_sentence(home):
    server = Server(home)
    server.env["IMAGESERVER_ADMIN_BIND"] = server.env["IMAGESERVER_BIND"]
    assert refused(server).startswith(
        f"imageserver: IMAGESERVER_ADMIN_BIND: {server.env['IMAGESERVER_BIND']} is an address of "
    )


def test_no_admin_listener_reads_back_from_show_config(home):
    server = Server(home, admin_bind="None")
    show = [sys.executable, "-m", "imageserver", "--show-config"]
    done = subprocess.run(
        show, cwd=ROOT, env=server.env, capture_output=True, text=True, check=True
    )
    assert "IMAGESERVER_ADMIN_BIND=none\n" in done.stdout


def test_another_worker_class_does_not_serve_images_there(home):
    admin = Admin(free_port())
    server = Server(home, workers=1, admin_bind=admin.bind)
    server.command += ["--worker-class", "gthread"]
    with server:
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                admin.ask("/healthz")
            pids = server.worker_pids()
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda pids=pids: not set(pids) & set(server.worker_pids()), 20)
            wait_until(server.worker_pids)
            assert server.request("GET", "/").status == 404
        assert f"nothing listens at IMAGESERVER_ADMIN_BIND={admin.bind}" in server.log


# Reloading, upgrading


@pytest.fixture
def own(home: Path) -> Iterator[tuple[Server, list[Admin]]]:
    """A server of the test's own, with an address of each kind, and who asks at each."""
    admins = [Admin(free_port()), Admin(home / "admin")]
    name = f"imageserver-test-{os.getpid()}-{home.name}"
    bind = ",".join([*(admin.bind for admin in admins), f"unix:@{name}"])
    with Server(home, admin_bind=bind) as server:
        yield server, [*admins, Admin(Path("\0" + name))]


def test_a_reload_and_a_stop_lose_no_address(own, home):
    server, admins = own
    before = server.worker_pids()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not set(before) & set(server.worker_pids()), 20)
    for admin in admins:
        assert admin.ask("/readyz").status == 200
    assert server.stop() == 0
    assert not (home / "admin").exists()
    assert "Traceback" not in server.log


def test_a_successor_takes_the_socket_of_a_server_that_was_killed(own):
    server, admins = own
    orphans = server.worker_pids()
    server.process.kill()
    server.process.wait()
    server.start()
    for admin in admins:
        assert admin.ask("/readyz").status == 200
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))


def test_an_upgrade_hands_every_address_over(own):
    server, admins = own
    workers = server.worker_pids()
    server.process.send_signal(signal.SIGUSR2)
    (new,) = wait_until(lambda: set(server.worker_pids()) - set(workers))
    try:
        wait_until(lambda: server.log.count(" accepts connections") == 6, 20)
        server.process.terminate()
        server.process.wait(20)
        for admin in admins:
            assert len(wait_until(lambda admin=admin: three(admin))) == 3
        assert admins[1].place.stat().st_mode & 0o777 == 0o600
    finally:
        end(new)


def three(admin: Admin) -> Any:
    workers = admin.status()["workers"]
    return workers if len(workers) == 3 else None
