# SPDX-License-Identifier: Apache-2.0
"""/status: the transfers that run, of every worker, and the workers."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.clients import putting, reading
from tests.system.disks import BIG, sparse
from tests.system.harness import Server, qemu_nbd, wait_until
from tests.system.watching import Admin, short, watched


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin, unix: Admin, big: dict[str, str]) -> Iterator[Server]:
    with watched(workplace, big, tcp, unix) as running:
        yield running


def rows(admin: Admin, operation: str) -> list[Any]:
    return [row for row in admin.transfers() if row["operation"] == operation]


def test_every_running_transfer_of_every_worker_is_told_as_it_advances(server, admin):
    name = short if repr(admin) == "tcp" else str
    with contextlib.ExitStack() as stack:
        pids = set()

        def read() -> bool:  # until two workers have one
            sock = stack.enter_context(reading(server, "/images/big"))
            pids.add(server.worker_of(sock))
            return len(pids) > 1

        wait_until(read)
        sock, _ = stack.enter_context(putting(server, "/images/file", BIG, bytes(4 << 20)))
        (put,) = wait_until(lambda: rows(admin, "replace"))
        assert set(put) == {
            *("id", "operation", "client", "worker"),
            *("done", "expected", "rate", "age", "key"),
        }
        assert (put["id"], put["client"]) == (name("file"), "127.0.0.1")
        reads = rows(admin, "read")
        assert {row["id"] for row in reads} == {name("big")}
        assert {row["worker"] for row in reads} == pids
        assert {row["worker"]: row["busy"] for row in admin.status()["workers"]}.keys() >= pids

        seen = [put["done"]]
        for _ in range(3):
            sock.sendall(bytes(8 << 20))
            seen.append(wait_until(lambda: advanced(admin, seen[-1]))["done"])
        (put,) = rows(admin, "replace")
        assert put["expected"] == BIG
        assert 0 < put["age"] < 60
        ages = put["age"] + 0.001, max(put["age"] - 0.001, 0.0001)  # of a rounded number
        least, most = (put["done"] / age for age in ages)
        assert least - 1 <= put["rate"] <= most + 1
    wait_until(lambda: admin.transfers() == [])


def advanced(admin: Admin, done: int) -> Any:
    (row,) = rows(admin, "replace")
    return row if row["done"] > done else None


def test_what_has_ended_is_told_with_its_reason_whichever_worker_did_it(server, admin):
    name = short if repr(admin) == "tcp" else str
    server.add("gone", socket="/nowhere/<b>gone</b>")
    before = admin.status()["refusals"].get("unknown_image", 0)
    for _ in range(3):
        ranged = server.request("GET", "/images/big", headers={"Range": "bytes=0-4095"})
        assert ranged.status == 206
        assert server.request("GET", "/images/gone").status == 500
        assert server.request("GET", "/images/<script>").status == 404

    def told() -> Any:  # what a worker did in the last second may be missing
        found = admin.status()
        finished = [row for row in found["finished"] if row["status"] == 206]
        failed = [row for row in found["failed"] if row["id"] == name("gone")]
        refused = found["refusals"].get("unknown_image", 0) - before
        is_whole = all(rows and rows[0]["count"] % 3 == 0 for rows in (finished, failed))
        return (finished, failed, json.dumps(found)) if is_whole and refused == 3 else None

    (finished, *_), (failed,), text = wait_until(told)
    assert (finished["id"], finished["operation"]) == (name("big"), "read")
    assert finished["done"] == finished["count"] * 4096
    assert (failed["status"], failed["error"]) == (500, "BackendError")
    assert failed["worker"] in server.worker_pids()
    assert "script" not in text
    assert "nowhere" not in text


def test_a_map_is_in_no_writers_way_where_the_images_server_has_one_place(server, unix, home):
    disk = sparse(home / "one", BIG)
    with qemu_nbd(disk, "--shared=1") as sock:
        server.add("one", socket=str(sock))
        url = "/images/one"
        server.request("PATCH", url, b"x", {"Range": "bytes=0-0"})
        drawn = wait_until(lambda: (got := unix.ask("/map?transfer=one")).status == 200 and got)
        assert drawn.json["map"]["size"] == BIG
        with putting(server, url, BIG, bytes(1)):
            refused = unix.ask("/map?transfer=one").json
            assert refused["map"] is None
            assert "no room" in refused["problem"]
        wait_until(lambda: unix.transfers() == [])
        asking = threading.Thread(target=lambda: [unix.ask("/map?transfer=one") for _ in range(10)])
        asking.start()
        while asking.is_alive():
            written = server.request("PATCH", url, b"x", {"Range": "bytes=0-0"})
            assert written.status == 200
        asking.join()


def test_slots_are_told_against_their_limits(server, admin):
    with reading(server, "/images/big"):
        slots = wait_until(lambda: (found := admin.status())["transfers"] and found["slots"])
        assert slots == {
            "read": {"in_use": 1, "limit": 8, "limit_per_image": None},
            "write": {"in_use": 0, "limit": 2, "limit_per_image": None},
        }
    wait_until(lambda: admin.transfers() == [])


def test_the_oldest_comes_first(server, admin):
    with reading(server, "/images/big"), putting(server, "/images/file", BIG):
        ages = [row["age"] for row in wait_until(lambda: [*admin.transfers()])]
        wait_until(lambda: len(admin.transfers()) == 2)
        ages = [row["age"] for row in admin.transfers()]
        assert ages == sorted(ages, reverse=True)
    wait_until(lambda: admin.transfers() == [])


def test_every_worker_is_told_with_its_state(server, admin):
    states = ["accepting"] * len(server.worker_pids())
    wait_until(lambda: [row["state"] for row in admin.status()["workers"]] == states)
    assert [row["worker"] for row in admin.status()["workers"]] == sorted(server.worker_pids())


def test_what_a_dead_worker_ran_is_gone(server, unix):
    with contextlib.suppress(OSError), reading(server, "/images/big") as sock:
        dead = server.worker_of(sock)
        wait_until(unix.transfers)
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda: unix.transfers() == [])
        wait_until(lambda: len(server.worker_pids()) == 3)
        wait_until(lambda: len(unix.status()["workers"]) == 3)
        assert dead not in {row["worker"] for row in unix.status()["workers"]}
