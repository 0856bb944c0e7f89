# SPDX-License-Identifier: Apache-2.0
"""The CPU time and the memory of processes."""

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

_PAGE = os.sysconf("SC_PAGE_SIZE")
#: How often memory is sampled (the issue's figure).
_SAMPLE_SECONDS = 0.1


def timed(command: Sequence[str]) -> tuple[float, bytes]:
    """Run a program that must succeed; return its seconds and what it printed."""
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return time.monotonic() - began, done.stdout


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return the CPU time of these processes, threads that have ended included."""
    # The clock of another process, as clock_getcpuclockid(3) makes it: nanoseconds, not ticks.
    return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)


def resident(pids: Sequence[int]) -> int:
    """Return the resident memory of these processes, in bytes."""
    texts = [Path(f"/proc/{pid}/statm").read_text(encoding="ascii") for pid in pids]
    return sum(int(text.split()[1]) for text in texts) * _PAGE


class MemorySampler:
    """The largest resident memory of some processes during a ``with`` block."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = pids
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak = 0

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.peak = max(self.peak, resident(self._pids))

    def __enter__(self) -> Self:
        self.peak = resident(self._pids)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
