# SPDX-License-Identifier: Apache-2.0
"""A reload every second, under load that must not notice.

Clients on fresh connections, and on connections kept for as long as the server wants, some of
them idle across reloads. Every connection must be accepted, every request answered, whole.
"""

import signal
import tempfile
import time
from pathlib import Path

from lab.servers import Server

from soaking.backends import Image, NbdImage
from soaking.chaos import Trace
from soaking.clients import Caller, end
from soaking.storm import last, served

_CALLERS = 12


def run(seconds: float, seed: int, trace: Trace) -> None:
    """Reload every second for ``seconds``; failures are in ``trace``."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        home = Path(name)
        images: list[Image] = [Image(f"file{n}", home) for n in range(_CALLERS - 2)]
        nbd = [NbdImage(f"raw{n}", home, fmt="raw") for n in range(2)]
        for each in nbd:
            each.front = each.server.socket  # no proxy here
        images += nbd
        settings = {"max_readers": 64, "max_writers": 64, "admin_bind": f"unix:{home}/admin"}
        with served(images), Server(home, **settings) as server:
            for image in images:
                server.add(image.name, **image.transfer())
            _reload(server, images, seconds, str(seed), trace)


def _reload(server: Server, images: list[Image], seconds: float, seed: str, trace: Trace) -> None:
    callers = [Caller(f"caller{n}", server.port, trace, seed, [i]) for n, i in enumerate(images)]
    for number, caller in enumerate(callers):
        caller.idle = (0.0, 0.05, 2.5)[number % 3]
        caller.is_keeping = number % 2 == 0
        caller.start()

    def step() -> None:
        time.sleep(1)
        server.signal(signal.SIGHUP)
        trace.counts["reloads"] += 1

    last(seconds, trace, step)
    trace.expect("reloads", "GET 200", "OPTIONS 200", "PUT 200")
    end(callers, trace)
