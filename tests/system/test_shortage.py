# SPDX-License-Identifier: Apache-2.0
"""A server that has used up its descriptors or threads goes on, and recovers by itself."""

import contextlib
import http.client
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tests.system.clients import read_answer
from tests.system.controlling import Control
from tests.system.disks import sparse
from tests.system.harness import Server, free_port, qemu_nbd, wait_until
from tests.system.limiting import no_more_threads
from tests.system.skips import needs

SIZE = 32 << 20  # more than any socket's buffer
LIMIT = 64
BUSY = (503, "server busy")
GET = b"GET /images/file HTTP/1.1\r\nHost: x\r\n\r\n"


@contextlib.contextmanager
def serving(home: Path, **settings: object) -> Iterator[Server]:
    """A worker with a file, an NBD image, a registered one, and few descriptors if told so."""
    few = settings.pop("few_descriptors", False)
    server = Server(home, workers=1, threads=40, control_socket=home / "control", **settings)
    if few:
        server.command = ["prlimit", f"--nofile={LIMIT}:{LIMIT}", *server.command]
    server.env["IMAGESERVER_ADMIN_BIND"] = f"127.0.0.1:{free_port()}"
    with server, qemu_nbd(sparse(home / "disk", SIZE)) as sock:
        server.add("file", backend="file", file=str(sparse(home / "image", SIZE)))
        server.add("nbd", socket=str(sock))
        yield server
        assert "Traceback" not in server.log
        assert server.holders() == []


def descriptors(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.worker_pids()[0]}/fd"))


def cpu_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.worker_pids()[0]}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def probe(server: Server) -> None:
    """Ask as a load balancer does, and as a monitor."""
    began = time.monotonic()
    assert server.request("OPTIONS", "/images/*", timeout=5).status == 200
    assert time.monotonic() - began < 1
    port = int(server.env["IMAGESERVER_ADMIN_BIND"].rpartition(":")[2])
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as admin:
        admin.request("GET", "/healthz")
        assert admin.getresponse().status == 200


def everything_works(server: Server) -> bool:
    assert server.request("GET", "/images/file").body == bytes(SIZE)
    assert server.request("PUT", "/images/file", bytes(SIZE)).status == 200
    part = {"Content-Range": "bytes 0-511/*"}
    assert server.request("PUT", "/images/nbd", bytes(512), part).status == 200
    return True


def test_idle_connections_by_the_hundred_take_no_descriptor_that_others_need(home):
    with serving(home, few_descriptors=True) as server, contextlib.ExitStack() as stack:
        assert everything_works(server)  # what is opened once is open then
        before = descriptors(server)
        for _ in range(2 * LIMIT):
            stack.enter_context(server.raw())
        probe(server)
        assert everything_works(server)
        assert Control(home / "control").status()["status"] == "ok"
        used = cpu_seconds(server)
        time.sleep(0.5)
        assert cpu_seconds(server) - used < 0.2
        stack.close()
        wait_until(lambda: descriptors(server) <= before + 4)  # those that are held back


def test_transfers_that_have_all_descriptors_go_on_and_others_are_told_to_come_back(home):
    with serving(home, few_descriptors=True, max_readers=100) as server:
        with contextlib.ExitStack() as stack:
            streams, refused = [], []
            for _ in range(30):
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sock.settimeout(30)
                sock.connect(("127.0.0.1", server.port))
                sock.sendall(GET)
                stream = stack.enter_context(sock.makefile("rb"))
                if stream.peek(12)[9:12] == b"200":
                    streams.append(stream)
                else:
                    refused.append(read_answer(stream).refusal)
            assert len(streams) >= 5
            assert refused
            assert set(refused) == {BUSY}
            for _ in range(3):
                probe(server)
            assert server.request("GET", "/images/nbd").refusal == BUSY
            used = cpu_seconds(server)
            control = stack.enter_context(socket.socket(socket.AF_UNIX))
            control.connect(str(home / "control"))
            time.sleep(0.5)
            assert cpu_seconds(server) - used < 0.2
            assert read_answer(streams[0]).body == bytes(SIZE)
        wait_until(lambda: server.holders() == [])
        assert everything_works(server)
        assert server.log.count("no file descriptor is free") <= 2


@needs("thread limits")
def test_without_threads_what_runs_goes_on_and_others_are_told_to_come_back(home):
    with serving(home) as server, contextlib.ExitStack() as stack:
        workers = server.worker_pids()
        control = Control(home / "control")
        control.register("kept", backend="file", file=str(home / "image"))
        sock = stack.enter_context(server.raw(GET))
        stream = stack.enter_context(sock.makefile("rb"))
        assert stream.peek(12)[9:12] == b"200"
        wait_until(lambda: server.request("GET", "/images/none").status == 404)  # a second thread
        with no_more_threads(workers):
            # A thread is free, but these need another one for the image's side.
            assert server.request("GET", "/images/nbd").refusal == BUSY
            assert server.request("PUT", "/images/file", bytes(SIZE)).refusal == BUSY
            other = stack.enter_context(server.raw(GET))
            taking = stack.enter_context(other.makefile("rb"))
            assert taking.peek(12)[9:12] == b"200"
            assert server.request("GET", "/images/kept").refusal == BUSY
            for _ in range(3):
                probe(server)
            assert read_answer(stream).body == bytes(SIZE)
        assert everything_works(server)
        assert control.status()["status"] == "ok"
        assert server.request("GET", "/images/kept").body == bytes(SIZE)
        assert server.worker_pids() == workers
        assert "there is no thread for another" in server.log
