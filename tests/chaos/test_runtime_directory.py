# SPDX-License-Identifier: Apache-2.0
"""The runtime directory removed or replaced under a live server: nobody gets in twice."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import SIZE
from tests.chaos.world import Nbd
from tests.system.clients import putting, read_answer
from tests.system.controlling import Control, controlled
from tests.system.disks import refill
from tests.system.harness import Server, free_port, remove, repeatable, wait_until
from tests.system.killing import is_running
from tests.system.test_start import CHECK, SERVE, assert_one_sentence, run
from tests.system.watching import Admin

DATA = repeatable("runtime directory").randbytes(1 << 20)
LOST = (503, "server state unavailable")


@pytest.fixture
def admin() -> Admin:
    return Admin(free_port())


@pytest.fixture
def server(home: Path, nbd: Nbd, admin: Admin) -> Iterator[Server]:
    with controlled(home, workers=2, admin_bind=admin.bind) as running:
        running.add("disk", socket=str(nbd.socket))
        yield running


def control(server: Server) -> Control:
    return Control(Path(server.env["IMAGESERVER_CONTROL_SOCKET"]))


def file_config(home: Path) -> dict[str, str]:
    (home / "image").write_bytes(DATA)
    return {"backend": "file", "file": str(home / "image")}


def refused(server: Server) -> set[tuple[int, str]]:
    """Return what a read, a write, extents and a flush are answered, by both workers for sure."""
    asked = [
        ("GET", "/images/disk"),
        ("PUT", "/images/disk"),
        ("GET", "/images/disk/extents"),
        ("POST", "/images/disk/flush"),
    ]
    return {server.request(*each, b"").refusal for each in asked for _ in range(8)}


def goes_on(server: Server, workers: set[int]) -> bool:
    """Tell whether as many workers accept as before, none of these that have been killed."""
    now = set(server.worker_pids())
    ready = [pid for pid in now if f"worker {pid} accepts connections" in server.log]
    return len(ready) == 2 and not now & workers


def test_a_removed_directory_lets_nobody_in_and_what_runs_ends_well(server, home, nbd, admin):
    assert control(server).register("known", **file_config(home))["status"] == "ok"
    assert server.request("GET", "/images/known").body == DATA
    refill(nbd.image, bytes(SIZE))
    with putting(server, "/images/disk", SIZE, DATA) as (writer, stream):
        remove(server.runtime)

        assert refused(server) == {LOST}
        assert server.request("GET", "/images/known").refusal == LOST  # not 404: it is known
        answer = control(server).register("other", **file_config(home))
        assert answer["status"] == "error"
        assert answer["message"].startswith("server state unavailable: ")
        assert server.request("OPTIONS", "/images/disk").status == 200
        assert server.request("OPTIONS", "/images/*").status == 200
        failed = admin.ask("/readyz").json["failed"]
        assert {each["check"] for each in failed} == {"runtime_dir", "slot_table"}
        writer.sendall(DATA * (SIZE // len(DATA) - 1))
        assert read_answer(stream, "PUT").json == {"ok": True, "bytes_written": SIZE}
    assert nbd.image.read_bytes() == DATA * (SIZE // len(DATA))
    assert not server.runtime.exists()
    wait_until(lambda: server.log.count("runtime directory: ") == 2)  # once for each worker


def test_without_its_directory_a_server_survives_reload_upgrade_and_the_death_of_workers(
    server, admin
):
    workers = set(server.worker_pids())
    remove(server.runtime)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload refused, the workers go on: IMAGESERVER_RUNTIME_DIR" in server.log)
    server.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "upgrade refused: IMAGESERVER_RUNTIME_DIR" in server.log)
    assert set(server.worker_pids()) == workers
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: goes_on(server, workers))

    assert refused(server) == {LOST}
    assert server.request("OPTIONS", "/images/disk").status == 200
    assert len(admin.status()["workers"]) == 2
    assert not server.runtime.exists()
    assert "Traceback" not in server.log


def test_a_directory_that_was_moved_away_and_back_is_used_again(server, home):
    server.runtime.rename(home / "away")
    shutil.copytree(home / "away", server.runtime)  # the same files, but others
    assert refused(server) == {LOST}
    remove(server.runtime)
    (home / "away").rename(server.runtime)

    assert server.request("GET", "/images/disk").status == 200
    assert server.request("POST", "/images/disk/flush").status == 200


@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_a_lock_file_that_is_gone_does_not_let_a_second_writer_in(server, home, how):
    with putting(server, "/images/disk", SIZE, DATA):
        for lock in (server.runtime / "locks").iterdir():
            lock.unlink() if how == "removed" else lock.rename(home / lock.name)
        answers = {server.request("PUT", "/images/disk", b"").refusal for _ in range(8)}
    assert answers == {(409, "image busy")}


def _move(path: Path) -> None:
    path.rename(path.with_name("away"))


@pytest.mark.parametrize(
    ("lose", "kills_master"),
    [
        pytest.param(remove, False, id="removed"),
        pytest.param(_move, True, id="moved, and its master killed"),
    ],
)
def test_no_server_starts_beside_one_that_has_lost_the_same_directory(
    server, home, lose, kills_master
):
    workers = server.worker_pids()
    with putting(server, "/images/disk", SIZE, DATA) as (writer, stream):
        lose(server.runtime)
        if kills_master:
            server.process.kill()
            server.process.wait()
        for command in (CHECK, SERVE):
            done = run(command, server.env | {"IMAGESERVER_BIND": f"unix:{home}/other"})
            words = ["IMAGESERVER_RUNTIME_DIR", "that has lost", "wait for or stop pid"]
            assert_one_sentence(done, words)
            assert {str(pid) for pid in workers} & set(re.findall("[0-9]+", done.stderr))
        assert not server.runtime.exists()
        writer.sendall(DATA * (SIZE // len(DATA) - 1))
        assert read_answer(stream, "PUT").status == 200
    if not kills_master:
        server.stop()
    wait_until(lambda: not any(map(is_running, workers)))
    server.start()
    assert server.request("GET", "/images/disk").status == 200
