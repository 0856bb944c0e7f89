# SPDX-License-Identifier: Apache-2.0
"""What the control socket outlives (docs/api.md): killed workers, reloads, restarts, upgrades."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.answers import UNKNOWN
from tests.system.clients import reading
from tests.system.controlling import asked, controlled, file_of
from tests.system.harness import ROOT, Server, wait_until
from tests.system.killing import end


@pytest.fixture
def server(home: Path) -> Iterator[Server]:
    """A server that may be mistreated."""
    with controlled(home) as running:
        yield running


def test_registrations_and_accounts_survive_workers_that_are_killed(server, control, big):
    control.register("x", **file_of(server, "one"))
    control.register("big", **big)
    assert server.request("GET", "/images/x").body == b"one"
    with reading(server, "/images/big"):
        wait_until(lambda: control.status("big")["bytes_read"] > 0)
        time.sleep(0.5)
        so_far = control.status("big")["bytes_read"]
        old = server.worker_pids()
        for pid in old:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(set(server.worker_pids()) - set(old)) == 3)
        found = control.status("big")
        assert (found["requests_in_flight"], found["bytes_read"]) == (0, so_far)
    assert control.status("x")["bytes_read"] == 3
    assert server.request("GET", "/images/x").body == b"one"
    assert control.unregister("big", timeout=1)["status"] == "ok"


def test_it_answers_throughout_a_reload(server, control, big):
    control.register("x", **file_of(server, "one"))
    control.register("big", **big)
    old = server.worker_pids()
    with (
        reading(server, "/images/big") as sock,
        asked(lambda: control.unregister("big")) as answers,
    ):
        wait_until(lambda: server.request("OPTIONS", "/images/big").status == 404)
        server.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert control.status("x")["status"] == "ok"
            assert control.register("y", **file_of(server, "one"))["status"] == "ok"
        wait_until(lambda: set(server.worker_pids()) - set(old))
        assert answers == []
        sock.close()
        assert wait_until(lambda: answers and answers[0]["status"] == "ok", 20)
    assert server.request("GET", "/images/x").body == b"one"


def test_registrations_survive_a_restart(server, control):
    for number in range(5):
        control.register(f"x{number}", **file_of(server, "one"))
    control.unregister("x0")
    server.stop()
    assert not control.path.exists()
    server.start()
    assert control.status()["active_transfers"] == 4
    assert server.request("GET", "/images/x4").body == b"one"
    assert server.request("GET", "/images/x0").refusal == UNKNOWN
    assert control.path.stat().st_mode & 0o777 == 0o660


def test_a_new_server_takes_over_from_one_whose_master_was_killed(server, control, big):
    control.register("big", **big)
    with reading(server, "/images/big"):
        orphans = server.worker_pids()
        server.process.kill()
        server.process.wait()
        server.start()
        try:
            found = control.status("big")
            assert (found["active_transfers"], found["requests_in_flight"]) == (1, 1)
            assert control.unregister("big", force=True)["status"] == "ok"
        finally:
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_an_upgrade_hands_the_socket_over(server, control):
    control.register("x", **file_of(server, "one"))
    workers = server.worker_pids()
    server.process.send_signal(signal.SIGUSR2)
    (new,) = wait_until(lambda: set(server.worker_pids()) - set(workers))
    try:
        wait_until(lambda: server.log.count(" accepts connections") == 6, 20)
        assert control.status("x")["status"] == "ok"
        server.process.terminate()
        server.process.wait(20)
        for _ in range(10):
            assert control.status("x")["status"] == "ok"
        assert control.path.stat().st_mode & 0o777 == 0o660
    finally:
        end(new)


def test_a_second_server_is_refused_while_the_first_one_listens(server, control, tmp_path):
    second = Server(tmp_path, control_socket=server.directory / "control")
    done = subprocess.run(
        second.command, cwd=ROOT, env=second.env, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "another server listens" in done.stderr
    assert control.status()["status"] == "ok"


def test_without_the_setting_nothing_is_registered(server, control):
    control.register("x", **file_of(server, "one"))
    server.stop()
    del server.env["IMAGESERVER_CONTROL_SOCKET"]
    server.start()
    assert server.request("GET", "/images/x").refusal == UNKNOWN
    assert not control.path.exists()
