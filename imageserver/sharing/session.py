# SPDX-License-Identifier: Apache-2.0
"""What happens while images are shared, and the end.

    SHARING   --signal--------------------------> DRAINING   the server finishes what runs
              --all qemu-nbds or the server died-> DRAINING
    DRAINING  --server ended--------------------> CLOSING    qemu-nbds write what they have, and end
    any       --second SIGINT or SIGTERM--------> CLOSING    the server is killed
    CLOSING   --all have ended------------------> (return)   a third kills the qemu-nbds

SIGHUP is never a second signal: who closes a terminal may send several.
"""

import contextlib
import enum
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from imageserver.client.commands.outputs import drop_output
from imageserver.client.failures import Interrupted
from imageserver.sharing.nbd import NbdServer
from imageserver.sharing.progress import Progress
from imageserver.sharing.serving import ImageServer

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Between two looks at running transfers.
_POLL_SECONDS = 1.0
#: How long a qemu-nbd may write at its end; after a second signal; and when all is being killed.
_END_SECONDS, _HURRY_SECONDS = 120.0, 5.0
_INTERRUPTED = 130


class State(enum.Enum):
    """See the module."""

    SHARING = enum.auto()
    DRAINING = enum.auto()
    CLOSING = enum.auto()


class Signals:
    """Signals that raise ``Interrupted``; after ``note``, they are bytes that can be read."""

    def __init__(self) -> None:
        self._is_raising = True
        self._ours, self._theirs = socket.socketpair()
        for sock in (self._ours, self._theirs):
            sock.setblocking(False)  # noqa: FBT003 - its signature
        self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._fd_before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)

    def note(self) -> None:
        """Raise no more."""
        self._is_raising = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_raising:
            self._is_raising = False  # what ends then is not interrupted again
            raise Interrupted("interrupted")

    def fileno(self) -> int:
        """Return what is readable when there are some."""
        return self._ours.fileno()

    def taken(self) -> list[int]:
        """Return what has come since the last call."""
        with contextlib.suppress(BlockingIOError):
            return [number for number in self._ours.recv(4096) if number in _SIGNALS]
        return []

    def close(self) -> None:
        """Restore the handlers."""
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._ours.close()
        self._theirs.close()


class Session:
    """Watches the server and the qemu-nbds until all have ended."""

    def __init__(
        self,
        server: ImageServer,
        nbds: list[NbdServer],
        signals: Signals,
        tell: Callable[[str], None],
        lost: Callable[[NbdServer], None],
    ) -> None:
        """``tell``: shows a line. ``lost``: is told of a qemu-nbd that died."""
        self._server = server
        self._nbds = list(nbds)
        #: How many images can still be used.
        self.images = len(nbds)
        self._signals = signals
        self._tell = tell
        self._lost = lost
        self._state = State.SHARING
        self._status = 0
        self._kill_at = float("inf")
        self._selector = selectors.DefaultSelector()
        self._selector.register(signals, selectors.EVENT_READ)
        self._selector.register(server.child.fd, selectors.EVENT_READ)
        for nbd in nbds:
            self._selector.register(nbd.fd, selectors.EVENT_READ)

    def run(self, progress: Progress | None, log: int | None) -> int:
        """Return the exit status once all have ended; ``log``: the server's log, to be shown."""
        if log is not None:
            self._selector.register(log, selectors.EVENT_READ)
        with contextlib.closing(self._selector):
            for ready in self._waits(progress):
                if log in ready and not self._show_log(progress, log):
                    self._selector.unregister(log)
                for number in self._signals.taken():
                    self._signalled(number)
                self._look_at_server()
                self._look_at_nbds()
                if progress is not None and self._state is not State.CLOSING:
                    progress.draw(self._server.status())
                if self._state is State.CLOSING and not self._nbds:
                    break
        return self._status

    def _waits(self, progress: Progress | None) -> Iterator[set[int]]:
        while True:
            bound = max(0.0, self._kill_at - time.monotonic())
            poll = _POLL_SECONDS if progress is not None else bound
            seconds = min(bound, poll)
            found = self._selector.select(None if seconds == float("inf") else seconds)
            yield {key.fd for key, _ in found}

    def _show_log(self, progress: Progress | None, log: int) -> bool:
        text = os.read(log, 65536).decode("utf-8", "replace")
        if progress is not None:
            progress.print(text)
        return bool(text)

    def _signalled(self, number: int) -> None:
        if self._state is State.SHARING:
            self._drain()
        elif number != signal.SIGHUP:
            self._status = _INTERRUPTED
            self._kill_at = 0.0 if self._state is State.CLOSING else self._kill_at
            self._server.kill()

    def _drain(self) -> None:
        self._state = State.DRAINING
        running = (self._server.status() or {}).get("transfers", ())
        if running:
            count = f"{len(running)} transfer{'s' * (len(running) != 1)}"
            self._tell(f"waiting for {count} to finish; Ctrl-C again ends at once")
        self._server.drain()

    def _look_at_server(self) -> None:
        if self._state is State.CLOSING or not self._server.child.has_ended():
            return
        if self._state is State.SHARING:
            self._tell(f"the server {self._server.child.end}")
            self._status = 1
        self._selector.unregister(self._server.child.fd)
        self._server.kill()  # workers of a master that was killed
        self._state = State.CLOSING
        patience = _HURRY_SECONDS if self._status == _INTERRUPTED else _END_SECONDS
        self._kill_at = time.monotonic() + patience
        for nbd in self._nbds:
            nbd.send(signal.SIGTERM)

    def _look_at_nbds(self) -> None:
        for nbd in [nbd for nbd in self._nbds if nbd.has_ended()]:
            self._selector.unregister(nbd.fd)
            self._nbds.remove(nbd)
            if self._state is not State.CLOSING:
                self._status = self._status or 1
                self.images -= 1
                self._lost(nbd)
        if not self.images and self._state is State.SHARING:
            self._tell("no image is left to share")
            self._drain()
        if time.monotonic() >= self._kill_at:
            for nbd in self._nbds:
                nbd.send(signal.SIGKILL)
            self._kill_at = time.monotonic() + _HURRY_SECONDS


def write(text: str, *, errors: bool = False) -> None:
    """Write to stdout or stderr at once; whoever closed it is not missed."""
    stream = sys.stderr if errors else sys.stdout
    with contextlib.suppress(OSError, ValueError):
        stream.write(text)
        stream.flush()


def end_output() -> None:
    """Flush stdout and stderr for the last time.

    What nobody takes goes to /dev/null: Python would try again at exit, and exit with 120.
    """
    for fd, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            drop_output(fd)
