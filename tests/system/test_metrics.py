# SPDX-License-Identifier: Apache-2.0
"""Metrics of a real server: they add up over its workers, and outlive them."""

import contextlib
import http.client
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.clients import putting, reading
from tests.system.disks import BIG
from tests.system.harness import Server, exchange, free_port, wait_until
from tests.system.killing import end
from tests.system.pki import TlsServer, make_pki
from tests.system.watching import Admin, short

SMALL = 1 << 20
#: Method, path, body and header fields of a request, and the status of its answer.
Question = tuple[str, str, bytes | None, dict[str, str], int]
OCTETS = {"Content-Type": "application/octet-stream", "Range": "bytes=0-9"}
#: Of another body.
ANOTHERS = {"Content-Digest": f"sha-256=:{'A' * 43}=:"}
JSON = {"Content-Type": "application/json"}
ZERO = b'{"op":"zero","offset":0,"size":4096}'
#: What every worker is asked.
ASKED: list[Question] = [
    ("GET", "/images/file", None, {}, 200),
    ("GET", "/images/big", None, {"Range": "bytes=10-19"}, 206),
    ("PUT", "/images/file", bytes(SMALL), {}, 200),
    ("PATCH", "/images/big", bytes(10), OCTETS, 200),
    ("PATCH", "/images/big", ZERO, JSON, 200),
    ("POST", "/images/big/flush", None, {}, 200),
    ("GET", "/images/big/extents", None, {}, 200),
    ("OPTIONS", "/images/big", None, {}, 200),
    ("PATCH", "/images/big", bytes(10), OCTETS | ANOTHERS, 400),
    ("GET", "/images/none", None, {}, 404),
    ("GET", "/images/dead", None, {}, 500),
    ("GET", "/images/big", None, {"Range": f"bytes={BIG}-"}, 416),
]
#: And while a PUT, which its client leaves, has ``big`` and the only write slot.
ASKED_MEANWHILE: list[Question] = [
    ("PUT", "/images/big", bytes(10), {}, 409),
    ("PUT", "/images/file", bytes(10), {}, 503),
]
LEFT = 'clients_gone_total{operation="replace"}'
#: What three workers have counted then, but for the status of the PUT that was left.
COUNTED = {
    'requests_total{method="GET",status="200"}': 6,
    'requests_total{method="GET",status="206"}': 3,
    'requests_total{method="GET",status="404"}': 3,
    'requests_total{method="GET",status="416"}': 3,
    'requests_total{method="GET",status="500"}': 3,
    'requests_total{method="PUT",status="200"}': 3,
    'requests_total{method="PUT",status="409"}': 3,
    'requests_total{method="PUT",status="503"}': 3,
    'requests_total{method="PATCH",status="200"}': 6,
    'requests_total{method="PATCH",status="400"}': 3,
    'requests_total{method="POST",status="200"}': 3,
    'requests_total{method="OPTIONS",status="200"}': 3,
    'image_bytes_total{backend="file",direction="read"}': 3 * SMALL,
    'image_bytes_total{backend="nbd",direction="read"}': 3 * 10,
    'image_bytes_total{backend="file",direction="write"}': 3 * SMALL,
    'image_bytes_total{backend="nbd",direction="write"}': 6 * 10,
    'image_bytes_total{backend="nbd",direction="zero"}': 3 * 4096,
    'refusals_total{reason="unknown_image"}': 3,
    'refusals_total{reason="range_not_satisfiable"}': 3,
    'refusals_total{reason="digest_mismatch"}': 3,
    'refusals_total{reason="image_busy"}': 3,
    'refusals_total{reason="no_write_slot"}': 3,
    'lock_conflicts_total{operation="replace"}': 3,
    'backend_errors_total{backend="nbd",kind="error"}': 3,
    'request_duration_seconds_count{operation="read"}': 12,
    'request_duration_seconds_count{operation="write"}': 6,
    'request_duration_seconds_count{operation="replace"}': 10,
    'request_duration_seconds_count{operation="zero"}': 3,
    'request_duration_seconds_count{operation="flush"}': 3,
    'request_duration_seconds_count{operation="extents"}': 3,
    'request_duration_seconds_count{operation="options"}': 3,
    'request_duration_seconds_count{operation="other"}': 3,
    LEFT: 1,
}


@pytest.fixture
def admin() -> Admin:
    return Admin(free_port())


@pytest.fixture
def server(home: Path, admin: Admin, big: dict[str, str]) -> Iterator[Server]:
    (home / "image").write_bytes(bytes(SMALL))
    with Server(home, admin_bind=admin.bind) as running:
        running.add("big", **big)
        running.add("file", backend="file", file=str(home / "image"))
        running.add("dead", socket=str(home / "none.sock"))
        yield running


@contextlib.contextmanager
def one_of_each(server: Server) -> Iterator[list[http.client.HTTPConnection]]:
    """Open connections until every worker has accepted one."""
    with contextlib.ExitStack() as stack:
        found: dict[int, http.client.HTTPConnection] = {}

        def connect() -> bool:
            connection = stack.enter_context(contextlib.closing(server.connect()))
            connection.connect()
            found.setdefault(server.worker_of(connection.sock), connection)
            return len(found) == server.workers

        wait_until(connect, 30)
        yield list(found.values())


def counts(admin: Admin) -> dict[str, float]:
    """Return what was counted, without zeros, connections and the times that requests took."""
    return {
        name: value
        for name, value in admin.metrics().items()
        if re.match(r"\w+_total\b|\w+_duration_seconds_count", name)
        and not name.startswith("connections_total")
        and value
    }


def settled(admin: Admin) -> dict[str, float]:
    """Return what was counted, with what workers may take a quarter of a second to write."""
    time.sleep(0.6)  # a quarter of a second twice, for they look four times a second
    return counts(admin)


def ask_each(connections: list[http.client.HTTPConnection], asked: list[Question]) -> None:
    """Ask everything on every connection; each answer must have its status."""
    for connection in connections:
        for method, path, body, headers, status in asked:
            answer = exchange(connection, method, path, body, headers)
            assert (method, path, answer.status) == (method, path, status)


def test_counts_over_all_workers_are_what_was_done(server, admin):
    with one_of_each(server) as connections:
        ask_each(connections, ASKED)
        with putting(server, "/images/big", BIG):
            ask_each(connections, ASKED_MEANWHILE)
    wait_until(lambda: counts(admin).get(LEFT))
    found = settled(admin)
    new = [name for name in found if name not in COUNTED]
    (left,) = [name for name in new if name.startswith('requests_total{method="PUT"')]
    assert found == COUNTED | {left: 1}


def test_what_never_becomes_a_request_is_counted(home, admin):
    with Server(home, workers=1, client_timeout=0.5, admin_bind=admin.bind) as server:
        assert server.bare("GET nothing", "x").status == 400
        with server.raw(b"GET / HTTP/1.1\r\nX: y") as slow:
            assert slow.makefile("rb").read().startswith(b"HTTP/1.1 408 ")
        assert counts(admin) == {
            'refusals_total{reason="bad_head"}': 1,
            'refusals_total{reason="head_timeout"}': 1,
        }
        assert admin.metrics()["connections_total"] == 2


def test_failed_handshakes_are_counted(home, admin):
    with TlsServer(home, make_pki(home / "pki"), workers=1, admin_bind=admin.bind) as server:
        with server.plain(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
            sock.makefile("rb").read()
        wait_until(lambda: counts(admin) == {"tls_handshake_failures_total": 1})


def test_bytes_and_gauges_advance_while_a_transfer_runs(server, admin):
    with (
        putting(server, "/images/file", BIG, bytes(8 << 20)) as (sock, _),
        reading(server, "/images/big"),
    ):
        wait_until(lambda: admin.metrics()['image_bytes_total{backend="nbd",direction="read"}'])
        name = 'image_bytes_total{backend="file",direction="write"}'
        seen = [wait_until(lambda: admin.metrics()[name])]
        for _ in range(3):
            sock.sendall(bytes(8 << 20))
            seen.append(wait_until(lambda: higher(admin, name, seen[-1])))
        found = admin.metrics()
        assert found['transfers{operation="replace"}'] == 1
        assert found['transfers{operation="read"}'] == 1
        assert found['slots_in_use{kind="read"}'] == found['slots_in_use{kind="write"}'] == 1
        assert found['transfer_expected_bytes{operation="replace"}'] == BIG
        assert found['transfer_done_bytes{operation="replace"}'] >= seen[-1]
        assert 0 < found['transfer_max_age_seconds{operation="replace"}'] < 60
        assert found["threads_busy"] == 2
        assert found["threads_limit"] == 3 * 64
        text = admin.ask("/metrics").body.decode()
        secrets = ("file", "big", short("file"), short("big"), "127.0.0.1", str(server.directory))
        told = re.sub(r'backend="file"', "", text)
        samples = [line for line in told.splitlines() if not line.startswith("#")]
        assert [line for line in samples for secret in secrets[:4] if f'"{secret}"' in line] == []
        assert [secret for secret in secrets[2:] if secret in text] == []
    wait_until(lambda: admin.metrics()['transfers{operation="replace"}'] == 0)


def higher(admin: Admin, name: str, than: float) -> Any:
    value = admin.metrics()[name]
    return value if value > than else None


def assert_grown(before: dict[str, float], after: dict[str, float]) -> None:
    """Nothing that was counted has become less."""
    assert {name: value for name, value in before.items() if after.get(name, 0) < value} == {}


def test_a_killed_worker_takes_no_count_with_it_and_leaves_no_gauge(server, admin):
    with one_of_each(server) as connections:
        for connection in connections:
            assert exchange(connection, "GET", "/images/file").status == 200
    with contextlib.suppress(OSError), reading(server, "/images/big") as sock:
        wait_until(lambda: admin.metrics()['transfers{operation="read"}'] == 1)
        before = settled(admin)
        os.kill(server.worker_of(sock), signal.SIGKILL)
        wait_until(lambda: admin.metrics()["worker_deaths_total"] == 1)
        wait_until(lambda: admin.metrics()['workers{state="accepting"}'] == 3)
        found = admin.metrics()
        assert found['transfers{operation="read"}'] == found['slots_in_use{kind="read"}'] == 0
        assert found["threads_busy"] == 0
        assert found['slots_reclaimed_total{kind="read"}'] == 1
        assert_grown(before, counts(admin))
        assert server.request("GET", "/images/file").status == 200
        name = 'requests_total{method="GET",status="200"}'
        wait_until(lambda: counts(admin)[name] == before[name] + 1)


def test_over_reloads_counts_grow_and_files_do_not(server, admin):
    stop = threading.Event()
    asked = [0]

    def ask() -> None:
        while not stop.is_set():
            assert server.request("GET", "/images/file").status == 200
            asked[0] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    name = 'requests_total{method="GET",status="200"}'
    try:
        before = counts(admin)
        for _ in range(10):
            workers = set(server.worker_pids())
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda old=workers: not old & set(server.worker_pids()), 20)
            after = counts(admin)
            assert_grown(before, after)
            before = after
    finally:
        stop.set()
        thread.join(30)
    wait_until(lambda: counts(admin)[name] == asked[0])
    # The master, three workers, and while they drain three more; a little room for a slow end.
    assert len(list((server.runtime / "metrics").glob("*.db"))) <= 2 * 10
    assert "deaths_total" not in "".join(counts(admin))


def test_a_file_damaged_by_others_does_not_break_the_metrics(server, admin):
    with one_of_each(server) as connections:
        for connection in connections:
            assert exchange(connection, "GET", "/images/file").status == 200
    name = 'requests_total{method="GET",status="200"}'
    wait_until(lambda: counts(admin).get(name) == 3)
    files = sorted((server.runtime / "metrics").glob("counter_*.db"))
    assert len(files) == 4
    with files[1].open("rb+") as file:
        file.write(b"\xff" * 4096)
    assert admin.metrics()["metrics_damaged_files"] == 1
    assert counts(admin)[name] < 3
    workers = server.worker_pids()
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: not set(workers) & set(server.worker_pids()), 20)
    server.process.send_signal(signal.SIGHUP)  # somebody takes the number by now
    wait_until(lambda: admin.metrics()["metrics_damaged_files"] == 0, 20)


def test_an_upgrade_goes_on_counting(server, admin):
    assert server.request("GET", "/images/file").status == 200
    before, workers = settled(admin), server.worker_pids()
    server.process.send_signal(signal.SIGUSR2)
    (new,) = wait_until(lambda: set(server.worker_pids()) - set(workers))
    try:
        wait_until(lambda: server.log.count(" accepts connections") == 6, 20)
        server.process.terminate()
        server.process.wait(20)
        wait_until(lambda: admin.metrics()['workers{state="accepting"}'] == 3)
        assert server.request("GET", "/images/file").status == 200
        assert_grown(before, counts(admin))
    finally:
        end(new)


def test_every_worker_tells_the_same_and_a_cold_start_begins_at_zero(server, admin):
    assert server.request("GET", "/images/file").status == 200
    assert settled(admin)
    told = set()
    for _ in range(12):
        with socket.create_connection(("127.0.0.1", admin.place), 30) as sock:
            sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            body = sock.makefile("rb").read().partition(b"\r\n\r\n")[2]
        told.add(tuple(line for line in body.splitlines() if b"_total" in line))
    assert len(told) == 1
    server.stop()
    server.start()
    assert counts(admin) == {}
