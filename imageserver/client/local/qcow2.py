# SPDX-License-Identifier: Apache-2.0
"""A local qcow2 image, served by a private qemu-nbd.

    imagectl --libnbd, one connection a thread--> qemu-nbd --> the descriptors of ``qcow2_chain``

qemu-nbd ends when its last connection closes, also when imagectl is killed, and writes what it
has cached. Its socket is removed once all connections are made. The socket's path begins with
the descriptor of its directory: a path of a socket is limited to 107 bytes.

No call waits in libnbd for longer than ``_TURN_MS``, so that Python can handle Ctrl-C in between.
At the end qemu-nbd gets time to write; a second Ctrl-C kills it.
"""

import contextlib
import math
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

try:
    import nbd
except ImportError:  # missing, or of no use here; only qcow2 needs it
    _HAS_LIBNBD = False
else:
    _HAS_LIBNBD = True

from imageserver.client.failures import InUse, LocalFailure
from imageserver.client.local.files import Buffer, Loss, local_errors
from imageserver.client.local.qcow2_chain import Chain, Member, OpenFile
from imageserver.client.local.qemu_programs import (
    END_SECONDS,
    LOCKED,
    as_filename,
    end,
    qemu_img,
    reason,
    start_nbd,
)
from imageserver.client.plan import GIB, Spans
from imageserver.core.extents import ALLOCATION, STATE_HOLE, STATE_ZERO

_START_SECONDS = 30.0
#: How long one wait in libnbd may take: after it, signals are handled and threads may stop.
_TURN_MS = 500
#: How long waiting threads may take to give their connections back.
_STOP_SECONDS = 5.0
#: Largest request for block status or zeros, in bytes: the protocol has lengths of 32 bits.
_STEP = 2 * GIB


class Qcow2:
    """An open image; each method takes one of its connections while it runs."""

    def __init__(self, chain: Chain, connections: int, *, writable: bool) -> None:
        """Serve ``chain``, which this image closes, also when the constructor fails."""
        self._chain = chain
        self._names = {file.fd: file.path for file in chain.files()}
        self.path = chain.members[0].file.path
        #: The first member of the chain that is only read.
        self._first_read = int(writable)
        with contextlib.ExitStack() as failed:
            failed.callback(chain.close)
            _require_libnbd()
            self._serve(connections + 1, failed)
            chain.require_as_read(self._first_read)
            failed.pop_all()
        self._idle: queue.SimpleQueue[nbd.NBD] = queue.SimpleQueue()
        for handle in self._all:
            self._idle.put(handle)
        self._is_ending = threading.Event()
        self._loss = Loss(self.path)
        #: Buffers of abandoned requests: libnbd may still use them.
        self._kept: list[Buffer] = []
        self.size: int = self._all[0].get_size()

    @classmethod
    def create(
        cls,
        path: str,
        size: int,
        connections: int,
        base: Chain | None = None,
        ours: os.stat_result | None = None,
    ) -> Self:
        """Make an image, or an overlay of ``base``; ``ours``: what ``path`` must lead to."""
        with contextlib.ExitStack() as failed:
            if base:
                failed.callback(base.close)
            file = OpenFile.create(path, ours)
            failed.callback(file.close)
            qemu_img(*_create(base), f"/proc/self/fd/{file.fd}", str(size), names={file.fd: path})
            chain = Chain([Member(file, file.header())])
            if base:  # its files are the new image's now
                chain.members += base.members
                chain.beyond = base.beyond
            failed.pop_all()
        return cls(chain, connections, writable=True)

    def _serve(self, connections: int, failed: contextlib.ExitStack) -> None:
        """Start qemu-nbd and connect to it; ``failed`` will kill it."""
        with contextlib.ExitStack() as undo, local_errors("a directory for a socket"):
            directory = tempfile.mkdtemp(prefix="imagectl-")
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            filename = as_filename(self._chain.node(linked(self._chain, directory)))
            sock, fds = f"/proc/self/fd/{fd}/nbd", [*self._names, fd]
            self._server = start_nbd(
                filename, sock, connections, fds, writable=bool(self._first_read)
            )
            failed.callback(end, self._server, kill=True)
            self._all = [self._connect(sock) for _ in range(connections)]

    def _connect(self, sock: str) -> "nbd.NBD":
        deadline = time.monotonic() + _START_SECONDS
        while True:
            handle = nbd.NBD()
            handle.add_meta_context(ALLOCATION)
            with contextlib.suppress(nbd.Error):  # qemu-nbd may not listen yet
                handle.aio_connect_unix(sock)
                while handle.aio_is_connecting() and time.monotonic() < deadline:
                    handle.poll(_TURN_MS)
                if handle.aio_is_ready():
                    return handle
            if self._server.poll() is not None:
                said = self._server.stderr.read() if self._server.stderr else ""
                if LOCKED.search(said):
                    raise InUse(f"{self.path} is in use by another program, as its lock tells")
                raise LocalFailure(f"{self.path}: {reason(said, self._names) or 'no qemu-nbd'}")
            if time.monotonic() >= deadline:
                raise LocalFailure(f"{self.path}: qemu-nbd does not answer")
            time.sleep(0.01)

    @contextlib.contextmanager
    def _handle(self, within: float = math.inf) -> Iterator["nbd.NBD"]:
        handle = self._taken(within)
        try:
            yield handle
        except nbd.Error as exc:
            raise LocalFailure(f"{self.path}: {exc.string}") from exc
        finally:
            self._idle.put(handle)

    def _wait(
        self, handle: "nbd.NBD", cookie: int, buffer: Buffer = b"", within: float = math.inf
    ) -> None:
        """Wait until a request is complete; ``buffer`` is what it reads or writes."""
        deadline, is_complete = time.monotonic() + within, False
        try:
            while not (is_complete := handle.aio_command_completed(cookie)):
                self._go_on_until(deadline)
                handle.poll(_TURN_MS)
        finally:
            if not is_complete:
                self._kept.append(buffer)

    def _go_on_until(self, deadline: float) -> None:
        if self._is_ending.is_set() or time.monotonic() > deadline:
            raise self._silent()

    def _taken(self, within: float) -> "nbd.NBD":
        try:
            return self._idle.get(timeout=None if math.isinf(within) else within)
        except queue.Empty:
            raise self._silent() from None

    def _silent(self) -> LocalFailure:
        return LocalFailure(f"{self.path}: qemu-nbd does not answer")

    def spans(self) -> Spans:
        """Return where the image or its backing files have data."""
        found, position = Spans(), 0
        with self._handle() as handle:
            while position < self.size:
                said: list[int] = []
                length = min(_STEP, self.size - position)
                self._wait(handle, handle.aio_block_status(length, position, _collect_into(said)))
                if not said:
                    raise LocalFailure(f"{self.path}: qemu-nbd tells no extents")
                for length, state in zip(said[::2], said[1::2], strict=True):
                    stop = min(position + length, self.size)
                    if not state & (STATE_HOLE | STATE_ZERO):
                        found.add(position, stop)
                    position = stop
        return found

    def read(self, start: int, length: int) -> bytes:
        """Return bytes of the image."""
        with self._handle() as handle:
            data = bytearray(length)
            view = memoryview(data)  # no nbd.Buffer: each leaks a reference to its memory
            self._wait(handle, handle.aio_pread(view, start), view)
            return bytes(data)

    def write(self, start: int, data: Buffer) -> None:
        """Write all of ``data``."""
        with self._handle() as handle:
            view = memoryview(data)
            self._wait(handle, handle.aio_pwrite(view, start), view)

    def zero(self, start: int, stop: int) -> None:
        """Zero a span; it hides the backing file's data."""
        with self._handle() as handle:
            for offset in range(start, stop, _STEP):
                self._wait(handle, handle.aio_zero(min(_STEP, stop - offset), offset))

    def sync(self, within: float = math.inf) -> None:
        """Bring written data to stable storage; fail after so many seconds."""
        with self._loss.noticed(), self._handle(within) as handle:
            self._wait(handle, handle.aio_flush(), within=within)

    def forget_cached(self) -> None:
        """Do nothing: qemu-nbd has the file open."""

    def require_unchanged(self) -> None:
        """Require the files that are only read not to have been written.

        Raises:
            LocalFailure: one was written or truncated: what was read may be wrong.
        """
        self._chain.require_unchanged(self._first_read)

    def close(self) -> None:
        """Close all connections and wait for qemu-nbd to end; may be called twice."""
        self._close(kill=not self._first_read)  # one that only reads has nothing to write

    def abandon(self) -> None:
        """Kill qemu-nbd: what it has not written is lost."""
        self._close(kill=True)

    def _close(self, *, kill: bool) -> None:
        handles, self._all = self._all, []
        if not handles:
            return
        self._is_ending.set()
        try:
            if not kill:
                self._hang_up(len(handles))
        except BaseException:
            kill = True
            raise
        finally:
            self._chain.close()
            end(self._server, kill=kill)

    def _hang_up(self, connections: int) -> None:
        """Disconnect all connections; waiting threads give theirs back within ``_TURN_MS``."""
        deadline = time.monotonic() + END_SECONDS
        for _ in range(connections):
            handle = self._taken(_STOP_SECONDS)
            with contextlib.suppress(nbd.Error):  # qemu-nbd has gone already
                handle.aio_disconnect()
                while not handle.aio_is_closed():
                    if time.monotonic() > deadline:
                        raise self._silent()
                    handle.poll(_TURN_MS)


def linked(chain: Chain, directory: str) -> dict[str, object] | None:
    """Return the node of a temporary image whose backing file is ``Chain.beyond``, if any.

    QEMU parses such a name only in an image, and the chain's own may have been rewritten.
    """
    if chain.beyond is None:
        return None
    name, kind = chain.beyond
    header, path = chain.members[-1].header, f"{directory}/link"
    backing = ("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", kind)
    qemu_img(*backing, path, str(header.size if header else 0), names={})
    return {"driver": "qcow2", "file": {"driver": "file", "filename": path}}


def _collect_into(said: list[int]) -> "Callable[[str, int, list[int], int], int]":
    def collect(context: str, _offset: int, entries: list[int], _error: int) -> int:
        if context == ALLOCATION:
            said.extend(entries)
        return 0

    return collect


def _create(base: Chain | None) -> list[str]:
    """Return qemu-img's arguments for a new image; -u: the backing file is not opened by name."""
    if base is None:
        return ["create", "-q", "-f", "qcow2"]
    top = base.members[0]
    full = os.path.join(os.getcwd(), top.file.path)  # symbolic links are kept
    kind = "qcow2" if top.header else "raw"
    return ["create", "-q", "-u", "-f", "qcow2", "-b", full, "-F", kind]


def _require_libnbd() -> None:
    if _HAS_LIBNBD:
        return
    lack = "qcow2 needs libnbd's Python module, which this Python has not: install python3-libnbd"
    if sys.prefix != sys.base_prefix:
        lack += (
            "; if it is, this virtual environment hides it, and one made with "
            "--system-site-packages does not"
        )
    raise LocalFailure(lack)
