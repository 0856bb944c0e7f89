# SPDX-License-Identifier: Apache-2.0
"""Files of counts that are removed, cut short or without room: images are served all the same."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.disks import fill, runtime_of, with_runtime_of_2_mib
from tests.system.harness import Server, free_port, remove, wait_until
from tests.system.killing import is_running
from tests.system.skips import needs
from tests.system.watching import Admin

OPERATIONS = 'requests_total{method="GET",status="200"}'


@pytest.fixture
def admin() -> Admin:
    return Admin(free_port())


@pytest.fixture
def server(home: Path, admin: Admin) -> Iterator[Server]:
    (home / "image").write_bytes(b"image")
    with Server(home, workers=2, admin_bind=admin.bind) as running:
        running.add("file", backend="file", file=str(home / "image"))
        yield running


def serves(server: Server) -> bool:
    return server.request("GET", "/images/file", timeout=5).body == b"image"


def reload(server: Server) -> None:
    old = server.worker_pids()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.is_dead() or not set(old) & set(server.worker_pids()), 20)
    assert not server.is_dead(), server.log


def kill_one(server: Server) -> None:
    old = server.worker_pids()
    os.kill(old[0], signal.SIGKILL)
    wait_until(lambda: not is_running(old[0]))
    wait_until(lambda: server.is_dead() or len(set(server.worker_pids()) - {old[0]}) == 2)
    assert not server.is_dead(), server.log


@pytest.mark.parametrize("then", [reload, kill_one])
def test_a_directory_that_was_removed_is_made_again(server, admin, then):
    assert serves(server)
    wait_until(lambda: admin.metrics().get(OPERATIONS) == 1)
    remove(server.runtime / "metrics")
    assert admin.ask("/metrics").status == 200
    then(server)
    assert serves(server)
    wait_until(lambda: admin.metrics().get(OPERATIONS, 0) >= 1)
    assert admin.metrics()["metrics_damaged_files"] == 0
    assert "Traceback" not in server.log


def test_files_cut_short_end_no_process_and_no_count_is_lost(server, admin):
    kill_one(server)
    assert serves(server)
    wait_until(lambda: admin.metrics().get(OPERATIONS) == 1)
    wait_until(lambda: admin.metrics().get("worker_deaths_total") == 1)
    workers = server.worker_pids()
    files = list((server.runtime / "metrics").glob("*.db"))
    assert len(files) > len(workers)
    for path in files:
        os.truncate(path, 0)
    assert all(serves(server) for _ in range(8))
    wait_until(lambda: admin.metrics().get(OPERATIONS) == 9)
    assert server.worker_pids() == workers
    kill_one(server)
    wait_until(lambda: admin.metrics().get("worker_deaths_total") == 2)
    assert "SIGBUS" not in server.log


@needs("mounts")
def test_a_full_runtime_directory_ends_no_new_worker(home, admin):
    (home / "image").write_bytes(b"image")
    server = with_runtime_of_2_mib(Server(home, workers=2, admin_bind=admin.bind))
    with server:
        server.add("file", backend="file", file=str(home / "image"))
        runtime = runtime_of(server)
        fill(runtime / "filling")
        reload(server)
        assert all(serves(server) for _ in range(8))
        assert admin.metrics()["metrics_damaged_files"] == 0
        assert [words for words in ("SIGBUS", "damaged") if words in server.log] == []
        (runtime / "filling").unlink()
        wait_until(lambda: admin.metrics().get(OPERATIONS) == 8)
