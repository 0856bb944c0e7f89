# SPDX-License-Identifier: Apache-2.0
"""Signals to the server: what runs is finished, nothing is refused that need not be.

Which signal does what is in docs/reliability.md; reloads under load are in ``test_storm.py``.
"""

import contextlib
import itertools
import os
import re
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.conftest import SIZE
from tests.chaos.world import Nbd, Prober, rest_of
from tests.system.clients import putting, read_answer, reading
from tests.system.disks import refill
from tests.system.harness import Server, exchange, repeatable, wait_until
from tests.system.killing import end, is_running

DATA = repeatable("processes").randbytes(1 << 20)
WHOLE = DATA * (SIZE >> 20)
TOO_MANY_READS = (503, "too many parallel reads")
BUSY = (409, "image busy")


@pytest.fixture
def server(home: Path, nbd: Nbd) -> Iterator[Server]:
    refill(nbd.image, WHOLE)
    with Server(home, max_readers=1, drain_timeout=20) as running:
        running.add("disk", socket=str(nbd.socket))
        wait_until(lambda: len(running.worker_pids()) == 3)
        yield running


@contextlib.contextmanager
def transfers(server: Server) -> Iterator[None]:
    """Have a GET and a PUT under way; afterwards, finish both and check every byte."""
    with (
        reading(server, "/images/disk") as reader,
        putting(server, "/images/disk", SIZE, DATA) as (writer, stream),
    ):
        yield
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(rest_of, reader, SIZE)
            writer.sendall(WHOLE[len(DATA) :])
            answer = read_answer(stream)
            assert answer.json == {"ok": True, "bytes_written": SIZE}
            assert received.result() == WHOLE


def refuses(server: Server) -> bool:
    """Tell whether nobody listens on the server's port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", server.port)) != 0


def test_sigterm_stops_accepting_and_finishes_what_runs(server):
    assert server.process is not None
    pids = server.worker_pids()
    with transfers(server):
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server))
    assert server.process.wait(10) == 0
    assert not [pid for pid in pids if is_running(pid)]
    assert not server.holders()


def test_what_is_meant_for_the_master_hurts_no_worker(server):
    """The end of a terminal sends SIGHUP to all of them; a script may send SIGTERM to one."""
    old = server.worker_pids()
    with transfers(server):
        for pid in old:
            os.kill(pid, signal.SIGHUP)
            os.kill(pid, signal.SIGUSR2)
        for pid in old:
            os.kill(pid, signal.SIGTERM)
        # They drain: others take their places at once.
        wait_until(lambda: len(set(server.worker_pids()) - set(old)) == 3)
        assert server.request("OPTIONS", "/images/disk").status == 200
    wait_until(lambda: not set(server.worker_pids()) & set(old))


def test_a_worker_without_descriptors_drains_all_the_same(server):
    assert server.process is not None
    with transfers(server):
        for pid in server.worker_pids():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3))
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(server))
    assert server.process.wait(10) == 0


def test_a_stop_finishes_what_runs_though_a_sockets_file_is_gone(home, nbd):
    refill(nbd.image, WHOLE)
    control = home / "control.sock"
    with Server(home, control_socket=str(control), drain_timeout=20) as server:
        server.add("disk", socket=str(nbd.socket))
        assert server.process is not None
        with transfers(server):
            control.unlink()
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(server))
        assert server.process.wait(10) == 0


def test_sigterm_drains_no_longer_than_the_drain_timeout(home, nbd):
    with Server(home, drain_timeout=1) as server:
        server.add("disk", socket=str(nbd.socket))
        with reading(server, "/images/disk") as sock, putting(server, "/images/disk", SIZE, DATA):
            began = time.monotonic()
            assert server.stop() == 0
            assert 0.8 < time.monotonic() - began < 5
            assert len(rest_of(sock)) < SIZE
        assert not server.holders()
        cut = re.findall(r"ends, for the drain timeout is over; transfers cut: (\d)", server.log)
        assert sum(map(int, cut)) == 2
        server.start()
        assert server.request("PUT", "/images/disk", WHOLE).status == 200


def test_sighup_finishes_what_runs_on_the_old_workers_and_refuses_no_connection(server):
    assert server.process is not None
    old = server.worker_pids()
    with contextlib.closing(server.connect()) as idle, Prober(server, "/images/disk") as prober:
        assert exchange(idle, "OPTIONS", "/images/disk").status == 200
        with transfers(server):
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: len(set(server.worker_pids()) - set(old)) == 3)
            assert server.request("GET", "/images/disk").refusal == TOO_MANY_READS
            assert server.request("PUT", "/images/disk", b"").refusal == BUSY
            # The next request on a connection that an old worker has open is answered.
            assert exchange(idle, "OPTIONS", "/images/disk").status == 200
        wait_until(lambda: not set(server.worker_pids()) & set(old))
    assert (prober.failed, prober.answered > 10) == ([], True)
    assert not server.holders()


def test_sighup_again_while_new_workers_boot_keeps_idle_connections(server):
    """Between two generations there are moments in which nobody accepts; idle clients stay."""
    assert server.process is not None
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(contextlib.closing(server.connect())) for _ in range(6)]
        for connection in idle:
            assert exchange(connection, "OPTIONS", "/images/disk").status == 200
        socks = [connection.sock for connection in idle]
        for _ in range(4):
            before = set(server.worker_pids())
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda before=before: len(set(server.worker_pids()) - before) == 3)
            ended, _, _ = select.select(socks, [], [], 1.2)
            assert not ended
        for connection in idle:
            assert exchange(connection, "OPTIONS", "/images/disk").status == 200


def test_usr2_runs_two_masters_with_one_set_of_limits_and_refuses_no_connection(server):
    assert server.process is not None
    old = server.process
    workers = server.worker_pids()
    with Prober(server, "/images/disk") as prober:
        with transfers(server):
            old.send_signal(signal.SIGUSR2)
            (new,) = wait_until(lambda: set(server.worker_pids()) - set(workers))
            children = Path(f"/proc/{new}/task/{new}/children")
            try:
                wait_until(lambda: len(children.read_text().split()) == 3)
                refused_by_both(server, [workers, [*map(int, children.read_text().split())]])
                old.send_signal(signal.SIGTERM)
                for _ in range(10):
                    assert server.request("GET", "/images/disk").refusal == TOO_MANY_READS
                    assert server.request("PUT", "/images/disk", b"").refusal == BUSY
            except BaseException:
                end(new)
                raise
        try:
            assert old.wait(20) == 0
            assert server.request("GET", "/images/disk").status == 200
            assert not server.holders()
        finally:
            prober.__exit__()
            end(new)
    assert (prober.failed, prober.answered > 10) == ([], True)
    assert refuses(server)


def refused_by_both(server: Server, generations: list[list[int]]) -> None:
    """See both limits refuse on connections to workers of the old and of the new master."""
    met: set[int] = set()
    deadline = time.monotonic() + 10
    while not all(met & set(pids) for pids in generations):
        assert time.monotonic() < deadline, (met, generations)
        with contextlib.closing(server.connect()) as connection:
            assert exchange(connection, "GET", "/images/disk").refusal == TOO_MANY_READS
            assert exchange(connection, "PUT", "/images/disk", b"").refusal == BUSY
            met.add(server.worker_of(connection.sock, [*itertools.chain(*generations)]))


def test_master_killed_and_its_workers_free_the_port_and_finish_what_runs(server):
    assert server.process is not None
    orphans = server.worker_pids()
    with transfers(server):
        server.process.kill()
        server.process.wait()
        wait_until(lambda: refuses(server), 2)
    wait_until(lambda: not [pid for pid in orphans if is_running(pid)], 10)
    assert not server.holders()
    server.start()


def test_master_killed_and_a_new_server_beside_its_workers_has_true_counts(server):
    assert server.process is not None
    with transfers(server):
        server.process.kill()
        server.process.wait()
        wait_until(lambda: refuses(server), 2)
        server.start()
        for _ in range(10):
            assert server.request("GET", "/images/disk").refusal == TOO_MANY_READS
            assert server.request("PUT", "/images/disk", b"").refusal == BUSY
    assert server.request("GET", "/images/disk", headers={"Range": "bytes=0-0"}).status == 206
    assert server.request("PUT", "/images/disk", WHOLE).status == 200
    assert not server.holders()
