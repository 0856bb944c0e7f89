# SPDX-License-Identifier: Apache-2.0
"""Starts everything, runs the storm, and checks that all was given back at its end."""

import contextlib
import math
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lab.model import WrongBytes
from lab.remains import remains
from lab.servers import Server
from lab.wire import Cut, Hanging, Wire

from soaking.backends import SIZE, Image, NbdImage, Proxy
from soaking.chaos import Chaos, Trace
from soaking.clients import (
    PATIENCE_SECONDS,
    Client,
    Prober,
    Reader,
    Surveyor,
    Writer,
    end,
)
from soaking.healing import Healing

READERS = 8
#: What the server is told; short, so that a soak sees every timeout many times.
SETTINGS = {
    "max_readers": READERS,
    "client_timeout": 3,
    "backend_timeout": 3,
    "chunk_size": 256 << 10,
}
#: What every storm must have had at least once.
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
    "healed",
)
#: How long a storm lasts at most, before everything is looked at.
STORM_SECONDS = 60.0
#: Nothing runs any more, and a refused upload lingers for 10 s at most.
STOP_SECONDS = 20


class Storm:
    """A server, its images and their clients."""

    def __init__(self, seed: int, trace: Trace, writers: int) -> None:
        """``writers``: how many may write at once; above 1, those of an image may share it."""
        self.trace = trace
        self._writers = writers
        self.seen: dict[str, Any] = {}
        self._seed = str(seed)
        self._probers: list[Prober] = []
        self._spare = [f"spare{number}" for number in range(writers + 1)]

    def run(self, seconds: float, pace: float) -> None:
        """Run for ``seconds``, in storms of a minute at most; failures are in ``trace``."""
        with tempfile.TemporaryDirectory(prefix="soak-") as name, self._world(Path(name)) as world:
            server, images = world
            storms = math.ceil(seconds / STORM_SECONDS)
            for number in range(storms):
                self._storm(server, images, f"{self._seed} {number}", seconds / storms, pace)
                if self.trace.failures:
                    return
            self.trace.expect(*MUST_HAPPEN)

    def _storm(
        self, server: Server, images: list[Image], seed: str, seconds: float, pace: float
    ) -> None:
        """Let it rage; then look whether all is right, all was given back, and all can be had."""
        nbd = [image for image in images if isinstance(image, NbdImage)]
        chaos = Chaos(server, nbd, self.trace, f"{seed} chaos", pace)
        clients = self._clients(server, images, seed)
        for thread in (*clients, chaos):
            thread.start()
        last(seconds, self.trace, lambda: time.sleep(0.1))
        chaos.stop()
        end(clients, self.trace)
        healing = Healing(server.port, images, self._spare, f"{seed} healing")
        for image in images:
            self._check_image(server, image)
        for failure in remains(server):
            self.trace.fail(failure)
        healing.check(self.trace, READERS)

    @contextlib.contextmanager
    def _world(self, home: Path) -> Iterator[tuple[Server, list[Image]]]:
        nbd = [NbdImage(f"raw{number}", home, fmt="raw") for number in range(3)]
        nbd.append(NbdImage("qcow2", home, fmt="qcow2"))
        images: list[Image] = [*nbd, Image("file", home)]
        with served(images), contextlib.ExitStack() as stack:
            proxy = Proxy(nbd, READERS, self._writers, SETTINGS["chunk_size"])
            stack.callback(proxy.stop)
            settings = SETTINGS | {"max_writers": self._writers, "admin_bind": f"unix:{home}/admin"}
            server = Server(home, **settings).start()
            stack.callback(self._stop, server)
            for image in images:
                server.add(image.name, **image.transfer())
            for name in self._spare:
                server.add(name, backend="file", file=str(home / name))
            yield server, images
            self._stop(server)
            self.seen = proxy.report()
            for violation in self.seen["violations"]:
                self.trace.fail(f"as the NBD server sees it: {violation}")
            for kind, peak in self.seen["peaks"].items():
                if not peak:  # as if the proxy did not understand what passes
                    self.trace.fail(f"nothing was tested: the NBD servers saw no {kind}")

    def _clients(self, server: Server, images: list[Image], seed: str) -> list[Client]:
        fixed = (server.port, self.trace, seed)
        nbd = [image for image in images if image.is_nbd]
        probers = [Prober(f"prober{n}", *fixed, images) for n in range(2)]
        self._probers += probers
        return [
            *(Reader(f"reader{n}", *fixed, images) for n in range(10)),
            *(Writer(f"writer of {image.name}", *fixed, [image]) for image in images),
            Surveyor("surveyor", *fixed, nbd),
            *probers,
        ]

    def _check_image(self, server: Server, image: Image) -> None:
        try:
            with image.model.reading(0, SIZE) as read, Wire(server.port, PATIENCE_SECONDS) as wire:
                wire.ask("GET", f"/images/{image.name}")
                answer = wire.answer()
                if len(answer.body) != SIZE:
                    raise WrongBytes(f"{answer.status}, {len(answer.body)} bytes")  # noqa: TRY301
                image.model.check(read, answer.body)
                if image.fmt == "raw":
                    image.model.check(read, image.path.read_bytes())
        except (WrongBytes, Cut, Hanging, OSError) as exc:
            self.trace.fail(f"{image.name} at the end: {exc}")

    def _stop(self, server: Server) -> None:
        try:
            server.stop(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log = "\n".join(server.log.splitlines()[-40:])
            self.trace.fail(f"the server did not end in {STOP_SECONDS} s:\n{log}")

    def slowest_probes(self) -> tuple[float, float]:
        """Return the 99th percentile of OPTIONS, and the slowest, in seconds."""
        seconds = sorted(second for prober in self._probers for second in prober.seconds)
        return (seconds[int(len(seconds) * 0.99)], seconds[-1]) if seconds else (0.0, 0.0)


@contextlib.contextmanager
def served(images: list[Image]) -> Iterator[None]:
    """Make images, and serve them until the block ends."""
    with contextlib.ExitStack() as stack:
        for image in images:
            stack.callback(image.stop)
            image.start()
        yield


def last(seconds: float, trace: Trace, step: Callable[[], object]) -> None:
    """Take one step after another for ``seconds``, or until something has failed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not trace.failures:
        step()
