# SPDX-License-Identifier: Apache-2.0
"""Reloads (SIGHUP) while transfers run: old workers drain, and new ones are looked after."""

import contextlib
import os
import signal
from pathlib import Path

from tests.system.clients import reading
from tests.system.harness import Server, wait_until

SIZE = 64 << 20  # more than the socket buffers of a connection hold


def test_new_workers_that_die_are_replaced_while_old_ones_drain(workplace: Path) -> None:
    with (workplace / "big").open("wb") as image:
        image.truncate(SIZE)
    with Server(workplace, workers=2) as server, contextlib.ExitStack() as stack:
        url = server.add("big", backend="file", file=str(workplace / "big"))
        old = set(server.worker_pids())
        held: set[int] = set()
        while held != old:
            held.add(server.worker_of(stack.enter_context(reading(server, url))))
        server.process.send_signal(signal.SIGHUP)
        new = wait_until(lambda: _two(server, old))
        for pid in new:
            os.kill(pid, signal.SIGKILL)
        newer = wait_until(lambda: _two(server, old | new))
        part = {"Range": "bytes=0-9"}
        assert server.request("GET", url, headers=part, timeout=5).status == 206
        assert old <= set(server.worker_pids())
        # A second reload stops the newer ones too, and none a second time.
        server.process.send_signal(signal.SIGHUP)
        newest = wait_until(lambda: _two(server, old | newer))
        wait_until(lambda: set(server.worker_pids()) == old | newest)
        stack.close()
        wait_until(lambda: set(server.worker_pids()) == newest)
        assert server.request("GET", url, headers=part, timeout=5).status == 206


def _two(server: Server, but: set[int]) -> set[int]:
    """Return the two other workers, once they accept connections."""
    others = set(server.worker_pids()) - but
    ready = {pid for pid in others if f"worker {pid} accepts connections" in server.log}
    return ready if len(ready) == 2 else set()
