# SPDX-License-Identifier: Apache-2.0
"""Ends of processes that are not our children: workers, and masters that an upgrade started."""

import contextlib
import os
import signal
import socket
from pathlib import Path

from tests.system.harness import Server, wait_until


def is_running(pid: int) -> bool:
    """Tell whether any thread of a process lives; a zombie that awaits its parent does not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] not in b"ZX" or int(fields[17]) > 1


def end(pid: int) -> None:
    """Ask a process that is not our child to end, and see that it does."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_running(pid), 20)


def kill_worker(server: Server, sock: socket.socket) -> int:
    """SIGKILL the worker that serves this connection; return its pid once it is gone."""
    pid = server.worker_of(sock)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    return pid
