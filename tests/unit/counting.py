# SPDX-License-Identifier: Apache-2.0
"""Processes that count in one directory, and what all of them have counted."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from imageserver.core.slots import Holder, Kind
from imageserver.observability.metrics.shown import Sources, exposition

ROOT = Path(__file__).parents[2]
#: A process that counts: each line it reads is one connection; it answers with its number.
_COUNT = """
import sys
from imageserver.observability.metrics.counted import metrics_in
metrics = metrics_in(sys.argv[1])
for _ in sys.stdin:
    metrics.accepted()
    metrics.flush()
    print(metrics._store._number.value, flush=True)
"""


class Process:
    """One of several processes that count in a directory."""

    def __init__(self, directory: Path) -> None:
        self._running = subprocess.Popen(
            [sys.executable, "-c", _COUNT, str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def count(self) -> int:
        """Count one connection; return the process's number."""
        _pipe(self._running.stdin).write("\n")
        _pipe(self._running.stdin).flush()
        return int(_pipe(self._running.stdout).readline())

    def kill(self) -> None:
        self._running.send_signal(signal.SIGKILL)
        self._running.wait()
        for pipe in (self._running.stdin, self._running.stdout):
            _pipe(pipe).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextlib.contextmanager
def processes(place: Path) -> Iterator[Callable[..., Process]]:
    """Yield what starts one more process, which ends with the block."""
    with contextlib.ExitStack() as ending:

        def start(directory: Path = place) -> Process:
            process = Process(directory)
            ending.callback(process.kill)
            return process

        yield start


class Nothing:
    """``ports.Living`` of a table where nothing is held."""

    def living(self, *kinds: Kind) -> list[Holder]:
        return []


def single(directory: Path, name: str) -> float:
    """Return a metric that has one value; -1: it is not shown."""
    limits = dict.fromkeys(Kind, 1)
    sources = Sources(str(directory), Nothing(), limits, {}, 1, {})
    lines = exposition(sources).text.decode().splitlines()
    found = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return float(found[0]) if found else -1


def total(directory: Path) -> float:
    """Return how many connections all processes have counted; -1: nobody."""
    return single(directory, "imageserver_connections_total")


def damaged(directory: Path) -> float:
    return single(directory, "imageserver_metrics_damaged_files")
