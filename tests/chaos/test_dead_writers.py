# SPDX-License-Identifier: Apache-2.0
"""A dead worker's last writes never land on top of its successor's.

A worker that is killed leaves writes in the NBD server's receive buffer. Its image's lock is
free at once; but whoever takes it next finds the dead one's slot, or that somebody has died, and
touches the image only when the NBD server has closed the dead one's connection.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.world import Nbd
from tests.system.clients import putting
from tests.system.disks import sparse
from tests.system.harness import ROOT, Server, listens, wait_until
from tests.system.killing import kill_worker
from tests.unit.nbd_liar import DISCONNECT, WRITE, Liar, Peer, lying

SIZE = 8 << 20
OLD, NEW = b"o" * SIZE, b"n" * SIZE
LAG = 1.5


@pytest.fixture
def disk(workplace: Path) -> Iterator[Nbd]:
    with Nbd(sparse(workplace / "image", SIZE)) as running:
        yield running


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with Server(workplace, backend_timeout=3, chunk_size=65536, queue_depth=16) as running:
        yield running


@contextlib.contextmanager
def lagging(nbd: Nbd) -> Iterator[Path]:
    """A proxy that passes on what a dead client has sent, but only after a pause."""
    front = nbd.socket.with_name("front.sock")
    command = [sys.executable, str(ROOT / "scripts" / "soaking" / "proxy.py")]
    command += [f"--lag={LAG}", f"{front}={nbd.socket}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            wait_until(lambda: listens(front))
            yield front
        finally:
            proxy.send_signal(signal.SIGTERM)
            seen = proxy.communicate(timeout=10)[0]
            front.unlink()
    assert '"violations": []' in seen


@contextlib.contextmanager
def half_put(server: Server, nbd: Nbd) -> Iterator[socket.socket]:
    """Be in the midst of a PUT of which some bytes are in the image already."""
    with putting(server, "/images/disk", SIZE, OLD[: 4 << 20]) as (sock, _):
        wait_until(lambda: nbd.image.read_bytes()[: 1 << 20] == OLD[: 1 << 20])
        assert server.holders() == ["WRITE disk"]
        yield sock


def begin_and_kill(server: Server, nbd: Nbd) -> None:
    """Leave writes in the NBD server's buffers that it does not get to see for the time being."""
    with half_put(server, nbd) as sock:
        nbd.signal(signal.SIGSTOP)
        sock.sendall(OLD[4 << 20 : 6 << 20])
        kill_worker(server, sock)


@pytest.mark.parametrize(
    ("method", "headers", "body", "result"),
    [
        ("PUT", {}, NEW, NEW),
        ("PATCH", {"Range": f"bytes=0-{SIZE - 1}"}, NEW, NEW),
        (
            "PATCH",
            {"Content-Type": "application/json"},
            b'{"op":"zero","size":%d}' % SIZE,
            bytes(SIZE),
        ),
    ],
    ids=["PUT", "PATCH", "zero"],
)
def test_the_successor_waits_until_a_stopped_server_has_let_go_of_the_dead(
    server, disk, method, headers, body, result
):
    server.add("disk", socket=str(disk.socket))
    try:
        begin_and_kill(server, disk)
        with ThreadPoolExecutor(1) as pool:
            successor = pool.submit(server.request, method, "/images/disk", body, headers)
            wait_until(lambda: server.holders() == ["WRITE disk"])
            disk.signal(signal.SIGCONT)
            assert successor.result().status == 200
    finally:
        disk.signal(signal.SIGCONT)
    assert disk.image.read_bytes() == result


def test_the_successor_waits_while_writes_of_the_dead_are_still_under_way(server, disk):
    """A proxy holds them back: without the wait they would land last, and stay."""
    with lagging(disk) as front:
        server.add("disk", socket=str(front))
        with half_put(server, disk) as sock:
            disk.signal(signal.SIGSTOP)
            sock.sendall(OLD[4 << 20 : 6 << 20])
            kill_worker(server, sock)
            disk.signal(signal.SIGCONT)
            died = time.monotonic()
        assert server.request("PUT", "/images/disk", NEW).status == 200
        assert time.monotonic() - died > LAG * 0.8
        # Long after everything that was held back has gone through:
        assert server.request("GET", "/images/disk").body == NEW
    assert disk.image.read_bytes() == NEW


def test_where_the_server_never_lets_go_the_successor_is_told_504_and_has_written_nothing(
    server, disk
):
    server.add("disk", socket=str(disk.socket))
    try:
        begin_and_kill(server, disk)
        answer = server.request("PUT", "/images/disk", NEW)
        assert answer.refusal == (504, "backend timeout")
        assert not server.holders()
        assert b"n" not in disk.image.read_bytes()
        # That one has settled nothing: the next one waits again, this time with success.
        disk.signal(signal.SIGCONT)
        assert server.request("PUT", "/images/disk", NEW).status == 200
    finally:
        disk.signal(signal.SIGCONT)
    assert disk.image.read_bytes() == NEW


def test_readers_need_not_wait_for_the_dead(server, disk):
    with lagging(disk) as front:
        server.add("disk", socket=str(front))
        with half_put(server, disk) as sock:
            kill_worker(server, sock)
        began = time.monotonic()
        assert len(server.request("GET", "/images/disk").body) == SIZE
        assert time.monotonic() - began < LAG * 0.8


class Garbler(Liar):
    """Answers its first write with nonsense, and carries out the others a while later."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SIZE)
        self.image = bytearray(SIZE)
        self.is_first = True

    def _serve(self, peer: Peer, number: int) -> None:
        peer.send(b"NBDMAGICIHAVEOPT", (3).to_bytes(2, "big"))
        peer.take(">I")
        self._negotiate(peer)
        while True:
            _, _, command, cookie, offset, length = peer.take(">IHHQQI")
            if command == DISCONNECT:
                return
            if command == WRITE:
                data = peer.stream.read(length)
                if self.is_first:
                    self.is_first = False
                    peer.send(bytes(16))
                    time.sleep(LAG)
                    continue
                self.image[offset : offset + length] = data
            with contextlib.suppress(OSError):  # this client has gone
                self.answer(peer, command, cookie, offset, length)


def test_the_successor_waits_for_writes_of_a_connection_that_was_given_up(server, workplace):
    """Nobody has died: libnbd breaks a connection off, and forgets what it had in flight."""
    with lying(Garbler(workplace / "garbler")) as nbd:
        server.add("disk", socket=str(nbd.path))
        assert server.request("PUT", "/images/disk", OLD).refusal == (500, "backend error")
        assert server.request("PUT", "/images/disk", NEW).status == 200
    # All that any connection has brought was carried out by now.
    assert nbd.image == NEW
