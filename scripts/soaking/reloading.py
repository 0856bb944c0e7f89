# SPDX-License-Identifier: Apache-2.0
"""A reload every second, under load that must not notice.

Clients on fresh connections, and on connections kept for as long as the server wants, some of
them idle across reloads. Every connection must be accepted, every request answered, whole.
"""

import signal
import tempfile
import time
from pathlib import Path

from backends import SIZE, Image, NbdImage
from chaos import Trace
from clients import Client
from wire import Wire, pattern

from tests.system.harness import Server

_CALLERS = 12


class Caller(Client):
    """Makes one request after another; ``idle``: seconds at most between two."""

    def __init__(self, *args: object, image: Image, idle: float, is_keeping: bool) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._image = image
        self._idle = idle
        self._is_keeping = is_keeping
        self._content = bytes(SIZE)

    def act(self) -> None:
        """Make one request."""
        self._ended.wait(self.choose.uniform(0, self._idle))
        kind = self.choose.choice(("OPTIONS", "GET", "GET", "PUT"))
        with self.exchange(self._image, kind) as wire:
            fields = self._ask(wire, kind)
            if fields.get("connection") == "close" or not self._is_keeping:
                self.drop()

    def _ask(self, wire: Wire, kind: str) -> dict[str, str]:
        path = f"/images/{self._image.name}"
        if kind == "PUT":
            self._content = pattern(self.choose, SIZE)
            wire.ask("PUT", path, {"Content-Length": str(SIZE)})
            wire.send(self._content)
        else:
            wire.ask(kind, path)
        answer = wire.answer()
        self.trace.counts[f"{kind} {answer.status}"] += 1
        if answer.status != 200:  # noqa: PLR2004
            self.fail(f"{kind} {self._image.name}: {answer.status} {answer.body!r}")
        elif kind == "GET" and answer.body != self._content:
            self.fail(f"GET {self._image.name}: wrong bytes")
        return answer.fields


def run(seconds: float, seed: int, trace: Trace) -> None:
    """Reload every second for ``seconds``; failures are in ``trace``."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        home = Path(name)
        images: list[Image] = [Image(f"file{n}", home) for n in range(_CALLERS - 2)]
        nbd = [NbdImage(f"raw{n}", home, fmt="raw") for n in range(2)]
        for image in nbd:
            image.front = image.socket  # no proxy here
        images += nbd
        try:
            for image in images:
                image.start()
            with Server(
                home, max_readers=64, max_writers=64, admin_bind=f"unix:{home}/admin"
            ) as server:
                _reload(server, images, seconds, seed, trace)
        finally:
            for image in images:
                image.stop()


def _reload(server: Server, images: list[Image], seconds: float, seed: int, trace: Trace) -> None:
    for image in images:
        server.add(image.name, **image.transfer())
    callers = [
        Caller(
            f"caller{number}",
            server.port,
            trace,
            str(seed),
            image=image,
            idle=(0.0, 0.05, 2.5)[number % 3],
            is_keeping=number % 2 == 0,
        )
        for number, image in enumerate(images)
    ]
    for caller in callers:
        caller.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not trace.failures:
        time.sleep(1)
        assert server.process is not None  # noqa: S101
        server.process.send_signal(signal.SIGHUP)
        trace.counts["reloads"] += 1
    trace.expect("reloads", "GET 200", "OPTIONS 200", "PUT 200")
    for caller in callers:
        caller.stop()
    for caller in callers:
        caller.join(30)
        if caller.is_alive():
            trace.fail(f"{caller.name} does not end")
