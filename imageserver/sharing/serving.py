# SPDX-License-Identifier: Apache-2.0
"""The image server of one run of ``share``: a child in a session of its own.

The child is forked, not executed, and takes over what this process has imported: that halves the
time to the first URL. If this process is killed the child gets SIGQUIT, ends at once, and
removes the directory, which nobody else would do then.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from imageserver.client.failures import LocalFailure
from imageserver.client.local.qemu_programs import death_signal
from imageserver.sharing.place import remove_for_certain
from imageserver.sharing.processes import Child

_START_SECONDS = 30.0
#: How long the server may take to tell its status.
_ANSWER_SECONDS = 2.0
#: ... and how long what was killed may take.
_END_SECONDS = 2.0
#: What must not get lost between the fork and the server's own handlers.
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class ImageServer:
    """A running image server; ``directory`` is that of this run."""

    def __init__(self, serve: Callable[[], object], directory: str, log: int | None) -> None:
        """Fork; ``serve`` never returns. ``log``: the descriptor of its log; None: our stderr."""
        self._admin = os.path.join(directory, "admin.sock")
        sys.stdout.flush()
        sys.stderr.flush()
        ask = death_signal(signal.SIGQUIT)
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
        pid = os.fork()
        if pid == 0:
            _become(serve, ask, log, lambda: _end(parent, directory))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
        self.child = Child(pid)

    def wait_until_ready(self) -> None:
        """Return when it can serve.

        Raises:
            LocalFailure: it has ended, or cannot.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not self._is_ready():
            if self.child.has_ended():
                raise LocalFailure("the server did not start")
            if time.monotonic() > deadline:
                raise LocalFailure("the server does not answer")
            time.sleep(0.01)

    def _is_ready(self) -> bool:
        try:
            return self._ask("/readyz")[0] == http.HTTPStatus.OK
        except (OSError, ValueError, http.client.HTTPException):
            return False

    def status(self) -> Any:  # noqa: ANN401 - JSON
        """Return what ``/status`` says; None where there is no answer now."""
        try:
            return self._ask("/status")[1]
        except (OSError, ValueError, http.client.HTTPException):
            return None

    def _ask(self, path: str) -> tuple[int, Any]:
        with contextlib.closing(_Connection(self._admin)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def drain(self) -> None:
        """Have it finish what runs, and end."""
        self.child.send(signal.SIGTERM)

    def kill(self) -> bool:
        """End it and its workers at once; return False if there are none."""
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Kill what is left of it; may be called twice."""
        deadline = time.monotonic() + _END_SECONDS
        while self.kill() and time.monotonic() < deadline:
            self.child.has_ended()  # reaps it; the system does the same for its workers
            time.sleep(0.005)
        self.child.close()


class _Connection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _become(
    serve: Callable[[], object],
    ask: Callable[[], None],
    log: int | None,
    at_end: Callable[[], object],
) -> None:
    """In the child: serve, and end the process."""
    master, status = os.getpid(), 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _BLOCKED:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        ask()
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null if log is None else log, 1)
        if log is not None:
            os.dup2(log, 2)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
        serve()
    except SystemExit as exc:  # of gunicorn's master, and of each worker
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)  # noqa: T201 - as Python's exit does
    except BaseException:  # noqa: BLE001 - the last to see any
        traceback.print_exc()
    finally:
        if os.getpid() == master:
            at_end()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(status)


def _end(parent: int, directory: str) -> None:
    """Remove the directory if nobody else will: the parent was killed."""
    if os.getppid() != parent:
        remove_for_certain(directory)
