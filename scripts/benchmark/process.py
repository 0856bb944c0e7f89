# SPDX-License-Identifier: Apache-2.0
"""Processes: started, watched through /proc, and ended by pid."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
#: How often memory is sampled (the issue's figure).
SAMPLE_SECONDS = 0.1
_START_SECONDS = 20.0
_STOP_SECONDS = 10.0


class ServerFailed(Exception):
    """A server did not start; ``str()`` has the end of its log."""


def program(name: str) -> str:
    """Return a program's path.

    Raises:
        ServerFailed: it is not installed.
    """
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise ServerFailed(f"{name} is missing: run scripts/setup --bench")
    return path


def run(command: Sequence[str]) -> tuple[float, bytes]:
    """Run a program that must succeed; return its seconds and what it printed."""
    began = time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603 - as above
    return time.monotonic() - began, done.stdout


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    """Tell whether somebody accepts on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def server(
    command: Sequence[str],
    log: Path,
    is_ready: Callable[[int], object],
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[int]:
    """Run a server until the block ends; yield its pid once ``is_ready(pid)``.

    Raises:
        ServerFailed: it ends, or is not ready in time.
    """
    with log.open("ab") as output:
        running = subprocess.Popen(  # noqa: S603 - the programs compared
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environ,
            cwd=cwd,
            start_new_session=True,  # a Ctrl-C is for us: we end it in our own order
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not is_ready(running.pid):
            if running.poll() is not None or time.monotonic() > deadline:
                raise ServerFailed(f"{command[0]} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)
        yield running.pid
    finally:
        _end(running)


def _end(running: subprocess.Popen[bytes]) -> None:
    family = [running.pid, *children(running.pid)] if running.poll() is None else []
    if family:
        running.send_signal(signal.SIGTERM)
    try:
        running.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.wait()


def children(pid: int) -> list[int]:
    """Return the pids of a process's children; none where it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(child) for child in text.split()]


def cpu_seconds(pids: Sequence[int]) -> float:
    """Return utime + stime of these processes (proc(5)), threads that have ended included."""
    total = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        fields = stat.rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


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
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, resident(self._pids))

    def __enter__(self) -> Self:
        self.peak = resident(self._pids)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
