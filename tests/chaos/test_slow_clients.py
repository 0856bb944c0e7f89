# SPDX-License-Identifier: Apache-2.0
"""Three hundred slow clients of four kinds: nobody else suffers, and none outstays its time."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.conftest import SIZE
from tests.chaos.world import Nbd
from tests.system.clients import putting, reading
from tests.system.disks import sparse
from tests.system.harness import Server, wait_until

pytestmark = pytest.mark.alone

CLIENT_TIMEOUT = 5.0
OF_EACH_KIND = 75
PROBES = 300


@pytest.fixture(scope="module")
def server(workplace: Path, nbd: Nbd) -> Iterator[Server]:
    """Room for every slow transfer: what is refused at once would be no burden."""
    with Server(
        workplace, client_timeout=CLIENT_TIMEOUT, max_readers=100, max_writers=100
    ) as running:
        running.add("fast", socket=str(nbd.socket))
        running.add("stuck", backend="file", file=str(sparse(workplace / "images-stuck", 16 << 20)))
        for number in range(OF_EACH_KIND):
            running.add(f"w{number}", backend="file", file=str(workplace / f"images-w{number}"))
        wait_until(lambda: len(running.worker_pids()) == 3)
        yield running


class Dribble(threading.Thread):
    """Sends a byte on each of some sockets now and then."""

    def __init__(self, socks: list[socket.socket], byte: bytes) -> None:
        super().__init__(daemon=True)
        self._socks = socks
        self._byte = byte
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for sock in self._socks:
                with contextlib.suppress(OSError):
                    sock.send(self._byte)


@contextlib.contextmanager
def slow_clients(server: Server) -> Iterator[tuple[list[socket.socket], Dribble]]:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.raw()) for _ in range(OF_EACH_KIND)]
        head = b"GET /images/fast HTTP/1.1\r\nX: "
        heads = [stack.enter_context(server.raw(head)) for _ in range(OF_EACH_KIND)]
        readers = [
            stack.enter_context(reading(server, "/images/stuck")) for _ in range(OF_EACH_KIND)
        ]
        bodies = [
            stack.enter_context(putting(server, f"/images/w{number}", 1 << 20, b"x"))[0]
            for number in range(OF_EACH_KIND)
        ]
        dribble = Dribble(heads + bodies, b"x")
        dribble.start()
        try:
            yield silent + heads + readers + bodies, dribble
        finally:
            dribble.ended.set()
            dribble.join()


def best_seconds(server: Server, times: int = 4) -> float:
    """Return how long a GET of a large image takes when nothing else comes in between."""
    seconds = []
    for _ in range(times):
        began = time.monotonic()
        assert len(server.request("GET", "/images/fast").body) == SIZE
        seconds.append(time.monotonic() - began)
    return min(seconds)


def probe_seconds(server: Server) -> list[float]:
    seconds = []
    for _ in range(PROBES):
        began = time.monotonic()
        assert server.request("OPTIONS", "/images/fast").status == 200
        seconds.append(time.monotonic() - began)
    return sorted(seconds)


def has_ended(sock: socket.socket) -> bool:
    """Tell whether the server has ended a connection; what it sent before is dropped."""
    sock.setblocking(False)
    try:
        while sock.recv(1 << 20):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def test_300_slow_clients_delay_nobody_and_are_gone_after_the_client_timeout(server):
    usual = best_seconds(server)
    with slow_clients(server) as (socks, dribble):
        probes = probe_seconds(server)
        among_slow = best_seconds(server)
        held = server.holders()
        assert len([kind for kind in held if kind.startswith("READ")]) == OF_EACH_KIND
        assert len([kind for kind in held if kind.startswith("WRITE")]) == OF_EACH_KIND
        assert probes[int(PROBES * 0.99)] < 0.25
        assert usual / among_slow > 0.5
        dribble.ended.set()  # bodies that come in a trickle do come; now they stop
        assert wait_until(lambda: not server.holders(), CLIENT_TIMEOUT + 3)
        assert wait_until(lambda: all(map(has_ended, socks)), 1)
