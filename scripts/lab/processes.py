# SPDX-License-Identifier: Apache-2.0
"""Programs: found, started, waited for, and ended by pid. Every wait polls with a deadline."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TypeVar

ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 30.0
_STOP_SECONDS = 30.0
T = TypeVar("T")


class LabFailed(AssertionError):
    """A program is missing or ended, or what was waited for did not come; ``str()`` says which."""


def wait_until(what: Callable[[], T], seconds: float = 10.0) -> T:
    """Poll until ``what`` returns something true, and return that.

    Raises:
        LabFailed: it did not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > deadline:
            raise LabFailed(f"still {found!r} after {seconds} s")
        time.sleep(0.01)
    return found


def with_sbin(path: str) -> str:
    """Return a PATH with the directories that Debian leaves out of a user's: haproxy is there."""
    found = path.split(os.pathsep)
    return os.pathsep.join([*found, *(d for d in ("/usr/sbin", "/sbin") if d not in found)])


def program(name: str) -> str:
    """Return a program's path.

    Raises:
        LabFailed: it is not installed.
    """
    path = shutil.which(name, path=with_sbin(os.environ.get("PATH", os.defpath)))
    if path is None:
        raise LabFailed(f"{name} is missing: run scripts/setup (--bench)")
    return path


def free_port() -> int:
    """Return a port of the loopback interface that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    """Tell whether somebody accepts connections on a port."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def children(pid: int) -> list[int]:
    """Return the pids of a process's children; none where it is gone."""
    with contextlib.suppress(OSError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def end(running: subprocess.Popen[bytes], seconds: float = _STOP_SECONDS) -> int:
    """End a process (SIGTERM), be it stopped, and return its status.

    Raises:
        subprocess.TimeoutExpired: it had to be killed, with its children, after ``seconds``.
    """
    if running.poll() is not None:
        return running.returncode
    family = children(running.pid)
    running.send_signal(signal.SIGTERM)
    running.send_signal(signal.SIGCONT)
    try:
        return running.wait(seconds)
    except subprocess.TimeoutExpired:
        running.kill()
        running.wait()
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise


def start(
    command: Sequence[str],
    log: IO[bytes],
    is_ready: Callable[[subprocess.Popen[bytes]], object],
    environ: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a server at the project's root; return when it is ready.

    Raises:
        LabFailed: it ended, or was not ready in time; it has ended then.
    """
    running = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    try:
        wait_until(lambda: running.poll() is not None or is_ready(running), _START_SECONDS)
    except BaseException:
        with contextlib.suppress(subprocess.TimeoutExpired):
            end(running)
        raise
    if running.poll() is not None:
        said = Path(f"/proc/self/fd/{log.fileno()}").read_text(errors="replace")
        raise LabFailed(f"{command[0]} did not start:\n{said[-2000:]}")
    return running


@contextlib.contextmanager
def process(
    command: Sequence[str],
    is_ready: Callable[[], object],
    environ: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends; what it prints is shown if it does not start."""
    with tempfile.TemporaryFile() as output:
        running = start(command, output, lambda _: is_ready(), environ)
    try:
        yield running
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            end(running)


def run(main: Callable[[], int], name: str) -> None:
    """Run a command's main function and exit with its status; SIGTERM unwinds as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except LabFailed as exc:
        sys.stderr.write(f"{name}: {exc}\n")
        status = 1
    sys.exit(status)
