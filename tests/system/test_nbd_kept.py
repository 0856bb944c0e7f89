# SPDX-License-Identifier: Apache-2.0
"""Connections to NBD servers that are kept for a moment: whose, and when they are closed."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.system.controlling import Control, controlled
from tests.system.disks import sparse
from tests.system.harness import (
    QemuNbd,
    Server,
    exchange,
    nbdkit,
    qemu_img,
    qemu_nbd,
    wait_until,
)

KIB = 1024
SIZE = 1 << 20
#: For a test of why a connection is closed, time alone must not be the reason.
LONG_SECONDS = 30
#: Sooner than the age at which a connection is closed when it is not in use.
SOON_SECONDS = 2.0


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    settings = {"nbd_idle_seconds": LONG_SECONDS, "backend_timeout": 1.5, "max_writers": 4}
    with controlled(workplace, **settings) as running:
        yield running


@pytest.fixture
def disk(home: Path) -> Iterator[QemuNbd]:
    with QemuNbd(sparse(home / "disk", SIZE)) as running:
        yield running


def _connections(sock: Path) -> set[int]:
    """Return the inodes of the server's ends of all connections to a socket."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    connected = "03"  # SS_CONNECTED; a listening socket is SS_UNCONNECTED
    return {int(f[6]) for f in lines if f[-1] == str(sock) and f[5] == connected}


def _get(connection: HTTPConnection, path: str, start: int = 0, length: int = KIB) -> bytes:
    fields = {"Range": f"bytes={start}-{start + length - 1}"}
    answer = exchange(connection, "GET", path, headers=fields)
    assert answer.status == 206, answer.body
    return answer.body


def _closed_soon(sock: Path, seconds: float = SOON_SECONDS) -> None:
    wait_until(lambda: not _connections(sock), seconds)


def _closed(sock: Path) -> None:
    """Prove that there is no connection; a server's end may outlive ours by a moment."""
    _closed_soon(sock, 0.2)


@contextlib.contextmanager
def _connected(server: Server) -> Iterator[HTTPConnection]:
    with contextlib.closing(server.connect()) as connection:
        yield connection


@contextlib.contextmanager
def _one_of_each(server: Server, workers: int) -> Iterator[list[HTTPConnection]]:
    """Have a connection to each of so many workers."""
    with contextlib.ExitStack() as opened:
        found: dict[int, HTTPConnection] = {}
        while len(found) < workers:
            connection = opened.enter_context(_connected(server))
            connection.connect()
            found.setdefault(server.worker_of(connection.sock), connection)
        yield list(found.values())


@contextlib.contextmanager
def _kept(server: Server, path: str, sock: Path, workers: int = 1) -> Iterator[None]:
    """Have so many workers keep a connection."""
    with _one_of_each(server, workers) as clients:

        def all_keep() -> bool:
            # A connect that is seen in the queue makes the others close theirs.
            for client in clients:
                _get(client, path)
            return len(_connections(sock)) == workers

        wait_until(all_keep)
        yield


def test_all_operations_of_a_client_that_goes_on_are_served_by_one_connection(server, disk, name):
    url = server.add(name, socket=str(disk.socket))
    place = {"Content-Range": f"bytes 0-{KIB - 1}/*"}
    seen: set[int] = set()
    with _connected(server) as connection:
        for number in range(3):
            data = bytes([number]) * KIB
            assert exchange(connection, "PUT", url, data, place).status == 200
            assert _get(connection, url) == data
            for method, target, body in (
                ("PATCH", url, b'{"op":"zero","offset":4096,"size":4096}'),
                ("POST", f"{url}/flush", None),
                ("GET", f"{url}/extents", None),
                ("GET", f"{url}/extents?context=dirty", None),
            ):
                fields = {"Content-Type": "application/json"} if body else {}
                assert exchange(connection, method, target, body, fields).status == 200
            seen |= _connections(disk.socket)
    assert len(seen) == 1


def test_an_idle_connection_is_closed_within_a_second(home: Path):
    disk = sparse(home / "disk", SIZE)
    with Server(home, workers=1) as server, qemu_nbd(disk) as sock, _connected(server) as client:
        url = server.add("disk", socket=str(sock))
        _get(client, url)
        (kept,) = _connections(sock)
        time.sleep(0.5)
        _get(client, url)
        since = time.monotonic()
        assert _connections(sock) == {kept}
        _closed_soon(sock)
        assert 0.5 < time.monotonic() - since < 1.3
        assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("shared", "idle_seconds"), [(1, LONG_SECONDS), (16, 0)], ids=["room-for-one", "turned-off"]
)
def test_where_none_may_be_kept_there_is_room_at_once(home: Path, shared: int, idle_seconds: int):
    disk = sparse(home / "disk", SIZE)
    with (
        Server(home, workers=1, nbd_idle_seconds=idle_seconds) as server,
        qemu_nbd(disk, f"--shared={shared}") as sock,
        _connected(server) as client,
    ):
        url = server.add("disk", socket=str(sock))
        for _ in range(3):
            _get(client, url)
            _closed(sock)
            qemu_img("info", f"nbd+unix:///?socket={sock}", timeout=5)


@pytest.mark.parametrize("timeout", [0, 10])
def test_unregister_answers_when_no_worker_has_a_connection_any_more(
    server: Server, control: Control, disk: QemuNbd, name: str, timeout: int
):
    control.register(name, socket=str(disk.socket))
    with _kept(server, f"/images/{name}", disk.socket, workers=3):
        assert control.unregister(name, timeout=timeout)["status"] == "ok"
        _closed(disk.socket)


def test_unregistering_one_of_two_leaves_what_is_kept_for_the_other(
    server: Server, control: Control, disk: QemuNbd, name: str
):
    for each in ("a", "b"):
        control.register(name + each, socket=str(disk.socket))
    with _connected(server) as connection:
        _get(connection, f"/images/{name}a")
        _get(connection, f"/images/{name}b")
        wait_until(lambda: len(_connections(disk.socket)) == 1)
        (kept,) = _connections(disk.socket)
        assert control.unregister(f"{name}a", timeout=0)["status"] == "ok"
        assert kept in _connections(disk.socket)
        assert control.unregister(f"{name}b", timeout=0)["status"] == "ok"
        _closed(disk.socket)


@pytest.mark.parametrize("change", ["removed", "replaced", "read-only", "re-registered"])
def test_a_transfer_that_ends_or_changes_closes_what_is_kept_for_it(
    server: Server, control: Control, disk: QemuNbd, name: str, change: str
):
    sock, is_file = str(disk.socket), change != "re-registered"
    if is_file:
        server.add(name, socket=sock)
    else:
        control.register(name, socket=sock)
    with _kept(server, f"/images/{name}", disk.socket):
        if change == "removed":
            (server.config / name).unlink()
        elif change == "replaced":
            server.add(name, backend="file", file=str(disk.image))
        elif change == "read-only":
            server.add(name, socket=sock, read_only=True)
        else:
            control.register(name, socket=sock, export="another")
        _closed_soon(disk.socket)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=lambda n: n.name)
def test_a_worker_that_drains_closes_what_it_keeps_at_once(home: Path, number: int):
    disk = sparse(home / "disk", 64 << 20)
    settings = {"workers": 1, "nbd_idle_seconds": LONG_SECONDS, "queue_depth": 1}
    with Server(home, **settings) as server, qemu_nbd(disk) as sock:
        url = server.add("disk", socket=str(sock))
        with server.raw(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode()) as running:
            running.recv(KIB)  # a request that keeps the worker until it is read
            with _connected(server) as client:
                busy = _connections(sock)
                _get(client, url)
                assert len(_connections(sock) - busy) == 1
                server.signal(number)
                wait_until(lambda: _connections(sock) == busy, SOON_SECONDS)


def test_a_server_that_is_killed_and_started_again_costs_no_client_an_error(server, disk, name):
    url = server.add(name, socket=str(disk.socket))
    place = {"Content-Range": f"bytes 0-{KIB - 1}/*"}
    with _connected(server) as connection:
        for number in range(4):
            data = bytes([number]) * KIB
            assert exchange(connection, "PUT", url, data, place).status == 200
            disk.restart()
            assert _get(connection, url) == data
            disk.restart()


def test_a_server_that_hangs_is_given_up_at_its_time(server, disk, name):
    url = server.add(name, socket=str(disk.socket))
    with _connected(server) as connection:
        _get(connection, url)
        with disk.stopped():
            since = time.monotonic()
            assert exchange(connection, "GET", url).refusal == (504, "backend timeout")
            assert 1.4 < time.monotonic() - since < 4
            # A probe asks on a connection of its own, and is told as ever.
            assert exchange(connection, "HEAD", url).status == 504
        _get(connection, url)


def test_exports_of_one_server_are_kept_apart(server, home, name):
    (home / "files").mkdir()
    urls = {}
    with nbdkit(home / "sock", "--readonly", "file", f"dir={home}/files") as sock:
        for export in "ab":
            (home / "files" / export).write_bytes(export.encode() * SIZE)
            urls[export] = server.add(name + export, socket=str(sock), export=export)
        with _connected(server) as connection:
            for export in "abababab":
                assert _get(connection, urls[export]) == export.encode() * KIB
            wait_until(lambda: len(_connections(sock)) == 2)
        for export in urls:  # nbdkit ends when its clients have gone
            (server.config / (name + export)).unlink()
        _closed_soon(sock)


def test_a_read_only_and_a_writable_transfer_of_one_export_stay_what_they_are(server, disk, name):
    urls = [
        server.add(f"{name}{each}", socket=str(disk.socket), read_only=each)
        for each in (False, True)
    ]
    place = {"Content-Range": f"bytes 0-{KIB - 1}/*"}
    with _connected(server) as connection:
        for number in range(3):
            data = bytes([number]) * KIB
            statuses = [exchange(connection, "PUT", url, data, place).status for url in urls]
            assert statuses == [200, 405]
            assert [_get(connection, url) for url in urls] == [data] * 2
            methods = [exchange(connection, "OPTIONS", url).headers["Allow"] for url in urls]
            assert ["PUT" in each for each in methods] == [True, False]
        # What other tests have left goes within a second; ours stays as long as it is used.
        wait_until(
            lambda: _get(connection, urls[1]) == data and len(_connections(disk.socket)) == 1
        )


@contextlib.contextmanager
def _client(sock: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SOON_SECONDS)
        client.connect(str(sock))
        yield client


def test_somebody_else_who_waits_to_be_let_in_gets_the_place(server, home, name):
    with qemu_nbd(sparse(home / "disk", SIZE), "--shared=2") as sock:
        url = server.add(name, socket=str(sock))
        with _kept(server, url, sock), _client(sock) as first:
            assert first.recv(8) == b"NBDMAGIC"
            with _client(sock) as second:
                assert second.recv(8) == b"NBDMAGIC"


def test_a_worker_that_waits_to_be_let_in_gets_the_place_of_another(server, home, name):
    with qemu_nbd(sparse(home / "disk", SIZE), "--shared=2") as sock:
        url = server.add(name, socket=str(sock))
        with _one_of_each(server, 3) as clients:
            for client in clients * 2:
                since = time.monotonic()
                _get(client, url)
                assert time.monotonic() - since < SOON_SECONDS


def test_a_server_that_turns_away_whom_it_has_no_room_for_serves_all_workers(home: Path):
    options = ("--filter=limit", "memory", str(SIZE), "limit=1")
    with (
        Server(home, workers=3) as server,
        nbdkit(home / "nbd", *options) as sock,
        contextlib.ExitStack() as opened,
    ):
        url = server.add("limited", socket=str(sock))
        clients = [opened.enter_context(_connected(server)) for _ in range(6)]
        for _ in range(2):
            for client in clients:
                _get(client, url)


def test_a_killed_workers_connection_goes_with_it(server, disk, name):
    url = server.add(name, socket=str(disk.socket))
    with _connected(server) as connection:
        connection.connect()
        worker = server.worker_of(connection.sock)
        _get(connection, url)
        os.kill(worker, signal.SIGKILL)
    _closed_soon(disk.socket)
    wait_until(lambda: len(server.worker_pids()) == 3)
    place = {"Content-Range": f"bytes 0-{KIB - 1}/*"}
    assert server.request("PUT", url, bytes(KIB), place).status == 200
