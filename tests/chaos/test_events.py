# SPDX-License-Identifier: Apache-2.0
"""What is true after clients, workers and NBD servers have died: docs/reliability.md, row by row.

Signals to the server as a whole are in ``test_processes.py``, what disks have to say in
``test_durability.py``; a full disk is met in ``tests/system/test_file_places.py``.
"""

import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.chaos.conftest import SIZE
from tests.chaos.world import Nbd, reset_on_close, rest_of
from tests.system.clients import putting, read_answer, reading
from tests.system.disks import refill, sparse
from tests.system.harness import Server, nbdkit, repeatable, wait_until
from tests.system.killing import kill_worker

CLIENT_TIMEOUT = 1.0
BACKEND_TIMEOUT = 2.0
IMAGES = ("disk", "file")
FIRST_BYTE = {"Range": "bytes=0-0"}
DATA = repeatable("events").randbytes(1 << 20)
WHOLE = DATA * (SIZE >> 20)


@pytest.fixture(scope="module")
def server(workplace: Path, nbd: Nbd) -> Iterator[Server]:
    """One reader and one writer, so that whatever is still held shows in the next request."""
    sparse(workplace / "images-file", SIZE)
    settings = {"client_timeout": CLIENT_TIMEOUT, "backend_timeout": BACKEND_TIMEOUT}
    with Server(workplace, max_readers=1, **settings) as running:
        running.add("disk", socket=str(nbd.socket))
        running.add("file", backend="file", file=str(workplace / "images-file"))
        yield running


def can_read(server: Server) -> bool:
    return server.request("GET", "/images/disk", headers=FIRST_BYTE).status == 206


def can_write(server: Server, name: str) -> bool:
    if name == "file":
        return server.request("PUT", "/images/file", WHOLE).status == 200
    return server.request("PATCH", "/images/disk", b"x", FIRST_BYTE).status == 200


def vanishes(sock: socket.socket, stream: BinaryIO | None = None) -> None:
    reset_on_close(sock)
    if stream:
        stream.close()  # for it keeps the socket open
    sock.close()


def closes(sock: socket.socket, _stream: BinaryIO) -> None:
    sock.shutdown(socket.SHUT_RDWR)


# Client vanishes or stalls


@pytest.mark.parametrize("name", IMAGES)
def test_client_vanishes_in_a_get_and_the_slot_is_free_at_once(server, name):
    with reading(server, f"/images/{name}") as sock:
        assert not can_read(server)
        vanishes(sock)
        assert wait_until(lambda: can_read(server), CLIENT_TIMEOUT / 2)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("end", [vanishes, closes])
def test_client_vanishes_in_a_put_and_lock_and_slot_are_free_at_once(server, name, end):
    with putting(server, f"/images/{name}", SIZE, DATA) as (sock, stream):
        assert server.holders() == [f"WRITE {name}"]
        end(sock, stream)
        wait_until(lambda: not server.holders(), CLIENT_TIMEOUT / 2)
    assert can_write(server, name)
    assert not list(server.directory.glob(".imageserver-*"))


def test_client_vanishes_in_any_moment_of_a_get_and_every_slot_comes_back(workplace, nbd):
    """What reads ahead is told to stop while anything may be true of its requests and buffers."""
    home = workplace / "moments"
    home.mkdir()
    choose = repeatable("moments")
    with Server(home, workers=2, chunk_size=4096, max_readers=100) as server:
        server.add("disk", socket=str(nbd.socket))
        for _ in range(150):
            with reading(server, "/images/disk") as sock:
                for _ in range(choose.randrange(5)):
                    sock.recv(choose.randrange(1, 50_000))
                reset_on_close(sock)
        assert wait_until(lambda: not server.holders())


@pytest.mark.parametrize("name", IMAGES)
def test_client_stalls_in_a_get_and_is_cut_off_after_the_client_timeout(server, name):
    began = time.monotonic()
    with reading(server, f"/images/{name}") as sock:
        wait_until(lambda: can_read(server), CLIENT_TIMEOUT * 3)
        assert time.monotonic() - began > CLIENT_TIMEOUT * 0.8
        assert len(rest_of(sock)) < SIZE


@pytest.mark.parametrize("name", IMAGES)
def test_client_stalls_in_a_put_and_is_cut_off_after_the_client_timeout(server, name):
    began = time.monotonic()
    with putting(server, f"/images/{name}", SIZE, DATA) as (sock, _):
        wait_until(lambda: not server.holders(), CLIENT_TIMEOUT * 3)
        assert time.monotonic() - began > CLIENT_TIMEOUT * 0.8
        assert rest_of(sock) == b""
    assert can_write(server, name)


def test_client_that_takes_a_little_now_and_then_is_not_cut_off(server):
    """Bytes move, though far too few for the kernel to call the server's socket writable."""
    began = time.monotonic()
    with reading(server, "/images/disk") as sock:
        taken = 0
        while time.monotonic() < began + CLIENT_TIMEOUT * 2:
            taken += len(sock.recv(8192))
            time.sleep(CLIENT_TIMEOUT / 10)  # a slow client is what this is about
        assert taken + len(rest_of(sock, SIZE - taken)) == SIZE


def test_client_that_sends_a_byte_now_and_then_is_not_cut_off(server):
    length = 16
    with server.raw(
        b"PATCH /images/disk HTTP/1.1\r\nHost: x\r\nRange: bytes=0-15\r\nContent-Length: 16\r\n\r\n"
    ) as sock:
        for _ in range(length):
            sock.sendall(b"s")
            time.sleep(CLIENT_TIMEOUT / 10)
        assert read_answer(sock.makefile("rb")).json == {"ok": True, "bytes_written": length}


# Worker killed


def test_worker_killed_and_the_transfers_of_the_others_end_with_every_byte(workplace, nbd):
    home = workplace / "six"
    home.mkdir()
    image = WHOLE[: 24 << 20]
    (home / "image").write_bytes(image)
    with Server(home) as server, ThreadPoolExecutor(6) as pool, contextlib.ExitStack() as stack:
        server.add("file", backend="file", file=str(home / "image"))
        server.add("disk", socket=str(nbd.socket))
        writer, stream = stack.enter_context(putting(server, "/images/disk", SIZE, DATA))
        readers = [stack.enter_context(reading(server, "/images/file")) for _ in range(6)]
        spared = server.worker_of(writer)
        victim = next(pid for pid in map(server.worker_of, readers) if pid != spared)
        hit = {sock for sock in readers if server.worker_of(sock) == victim}
        os.kill(victim, signal.SIGKILL)
        take = functools.partial(rest_of, size=len(image))
        received = dict(zip(readers, pool.map(take, readers), strict=True))
        writer.sendall(WHOLE[len(DATA) :])
        assert read_answer(stream).status == 200
        assert {sock for sock, data in received.items() if data != image} == hit
        assert all(image.startswith(received[sock]) for sock in hit)
        assert nbd.image.read_bytes() == WHOLE
        wait_until(lambda: len(server.worker_pids()) == 3)
        assert not server.holders()


def test_worker_killed_in_extents_frees_the_image_for_the_next_request(server, workplace):
    options = ("--filter=delay", "memory", "1M", "delay-extents=1")
    with nbdkit(workplace / "slow.sock", *options) as path:
        server.add("slow", socket=str(path))
        with server.raw(b"GET /images/slow/extents HTTP/1.1\r\nHost: x\r\n\r\n") as sock:
            wait_until(lambda: server.holders() == ["OTHER slow"])
            kill_worker(server, sock)
        assert server.request("PUT", "/images/slow", bytes(1 << 20)).status == 200
    assert not server.holders()


# NBD server dies or hangs


def test_nbd_server_killed_in_a_get_cuts_the_connection_and_its_successor_serves(server, nbd):
    with reading(server, "/images/disk") as sock:
        nbd.kill()
        assert len(rest_of(sock)) < SIZE
    answer = server.request("GET", "/images/disk", headers=FIRST_BYTE)
    assert answer.refusal == (500, "backend error")
    nbd.restart()
    assert can_read(server)


def test_nbd_server_killed_in_a_put_is_500_and_its_successor_serves(server, nbd):
    with putting(server, "/images/disk", SIZE, DATA) as (sock, stream):
        nbd.kill()
        with contextlib.suppress(ConnectionError):
            sock.sendall(DATA * 8)
        assert read_answer(stream).refusal == (500, "backend error")
        assert not server.holders()
    nbd.restart()
    assert can_write(server, "disk")


def test_nbd_server_stopped_in_a_get_cuts_the_connection_after_the_backend_timeout(server, nbd):
    with reading(server, "/images/disk") as sock, nbd.stopped():
        began = time.monotonic()
        assert len(rest_of(sock)) < SIZE
        assert BACKEND_TIMEOUT * 0.8 < time.monotonic() - began < BACKEND_TIMEOUT * 2.5
        wait_until(lambda: not server.holders(), 2)
    assert can_read(server)


def test_nbd_server_stopped_in_a_put_is_504_and_the_next_put_holds(server, nbd):
    """What the stopped server has not read yet must not land on what is written afterwards."""
    with putting(server, "/images/disk", SIZE, DATA * 8) as (sock, stream):
        wait_until(lambda: nbd.image.read_bytes()[:4096] == DATA[:4096])
        with nbd.stopped():
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                sock.sendall(WHOLE[8 * len(DATA) :])
            assert read_answer(stream).refusal == (504, "backend timeout")
            assert BACKEND_TIMEOUT * 0.8 < time.monotonic() - began < BACKEND_TIMEOUT * 2.5
            assert not server.holders()
    assert server.request("PUT", "/images/disk", bytes(SIZE)).status == 200
    assert nbd.image.read_bytes() == bytes(SIZE)


# Transfer deleted


def test_transfer_deleted_while_it_runs_lets_it_finish_and_is_unknown_at_once(server, nbd):
    url = server.add("short-lived", socket=str(nbd.socket))
    refill(nbd.image, WHOLE)
    with (
        ThreadPoolExecutor(1) as pool,
        reading(server, url) as sock,
        putting(server, url, SIZE, DATA) as (writer, stream),
    ):
        (server.config / "short-lived").unlink()
        for method in ("GET", "PUT", "OPTIONS"):
            assert server.request(method, url, b"").refusal == (404, "unknown image_id")
        received = pool.submit(rest_of, sock, SIZE)
        writer.sendall(WHOLE[len(DATA) :])
        assert read_answer(stream).status == 200
        assert received.result() == WHOLE
    assert not server.holders()
