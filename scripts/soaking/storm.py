# SPDX-License-Identifier: Apache-2.0
"""Starts everything, lets the storm blow, and looks whether all came back."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backends import SIZE, Image, NbdImage, Proxy
from chaos import Chaos, Trace
from clients import Client, Prober, Reader, Surveyor, Writer
from model import WrongBytes
from remains import held, signs_of_bugs
from wire import PATIENCE_SECONDS

from tests.system.harness import Server

READERS, WRITERS = 8, 1
#: What the server is told; short, so that a soak sees every timeout many times.
SETTINGS = {
    "max_readers": READERS,
    "max_writers": WRITERS,
    "client_timeout": 3,
    "backend_timeout": 3,
    "chunk_size": 256 << 10,
}
#: What a storm that has been one has seen at least once.
MUST_HAPPEN = (
    "GET 200",
    "GET 206",
    "OPTIONS 200",
    "PATCH 200",
    "PUT 200",
    "extents 200",
    "flush 200",
    "zero 200",
    "workers killed that held",
)
#: Nothing runs any more, and a refused upload lingers for 10 s at most.
STOP_SECONDS = 20


class Storm:
    """A server, its images and their clients."""

    def __init__(self, seed: int, trace: Trace) -> None:
        self.trace = trace
        self.seen: dict[str, Any] = {}
        self._seed = str(seed)
        self._probers: list[Prober] = []

    def run(self, seconds: float, pace: float) -> None:
        """Blow for ``seconds``; failures are in ``trace``."""
        with tempfile.TemporaryDirectory(prefix="soak-") as name, self._world(Path(name)) as world:
            server, images = world
            nbd = [image for image in images if isinstance(image, NbdImage)]
            chaos = Chaos(server, nbd, self.trace, f"{self._seed} chaos", pace)
            clients = self._clients(server, images)
            for thread in (*clients, chaos):
                thread.start()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and not self.trace.failures:
                time.sleep(0.1)
            chaos.stop()
            self._end(clients)
            for failure in held(server):
                self.trace.fail(failure)
            self._check_images(server, images)
            self._check_server(server)
            self.trace.expect(*MUST_HAPPEN)

    @contextlib.contextmanager
    def _world(self, home: Path) -> Iterator[tuple[Server, list[Image]]]:
        nbd = [NbdImage(f"raw{number}", home, fmt="raw") for number in range(3)]
        nbd.append(NbdImage("qcow2", home, fmt="qcow2"))
        images: list[Image] = [*nbd, Image("file", home)]
        with contextlib.ExitStack() as stack:
            for image in images:
                image.start()
                stack.callback(image.stop)
            proxy = Proxy(nbd, READERS, WRITERS)
            stack.callback(proxy.stop)
            server = Server(home, admin_bind=f"unix:{home}/admin", **SETTINGS).start()
            stack.callback(self._stop, server)
            for image in images:
                server.add(image.name, **image.transfer())
            yield server, images
            self._stop(server)
            self.seen = proxy.report()
            for violation in self.seen["violations"]:
                self.trace.fail(f"as the NBD server sees it: {violation}")
            for kind, peak in self.seen["peaks"].items():
                if not peak:  # as if the proxy did not understand what passes
                    self.trace.fail(f"nothing was tested: the NBD servers saw no {kind}")

    def _clients(self, server: Server, images: list[Image]) -> list[Client]:
        fixed = (server.port, self.trace, self._seed)
        nbd = [image for image in images if image.is_nbd]
        self._probers = [Prober(f"prober{n}", *fixed, images=images) for n in range(2)]
        return [
            *(Reader(f"reader{n}", *fixed, images=images) for n in range(10)),
            *(Writer(f"writer of {image.name}", *fixed, image=image) for image in images),
            Surveyor("surveyor", *fixed, images=nbd),
            *self._probers,
        ]

    def _end(self, clients: list[Client]) -> None:
        for client in clients:
            client.stop()
        deadline = time.monotonic() + PATIENCE_SECONDS + 5
        for client in clients:
            client.join(max(0.0, deadline - time.monotonic()))
            if client.is_alive():
                self.trace.fail(f"{client.name} does not end")

    def _check_images(self, server: Server, images: list[Image]) -> None:
        for image in images:
            read = image.model.begin_read(0, SIZE)
            try:
                answer = server.request("GET", f"/images/{image.name}")
                if len(answer.body) != SIZE:
                    self.trace.fail(f"{image.name} at the end: {answer.status}")
                else:
                    image.model.check(read, answer.body)
                if getattr(image, "fmt", "raw") == "raw":
                    image.model.check(read, image.path.read_bytes())
            except (WrongBytes, OSError) as exc:
                self.trace.fail(f"{image.name} at the end: {exc}")
            image.model.end_read(read)

    def _check_server(self, server: Server) -> None:
        if server.is_dead():
            self.trace.fail("the server died")
        for failure in signs_of_bugs(server.log):
            self.trace.fail(failure)

    def _stop(self, server: Server) -> None:
        if server.is_dead():
            return
        try:
            server.stop(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log = "\n".join(server.log.splitlines()[-40:])
            self.trace.fail(f"the server did not end in {STOP_SECONDS} s:\n{log}")

    def slowest_probes(self) -> tuple[float, float]:
        """Return the 99th percentile of OPTIONS, and the slowest, in seconds."""
        seconds = sorted(second for prober in self._probers for second in prober.seconds)
        return (seconds[int(len(seconds) * 0.99)], seconds[-1]) if seconds else (0.0, 0.0)
