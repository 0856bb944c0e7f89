# SPDX-License-Identifier: Apache-2.0
"""A local qcow2 image as one end of a transfer: a private qemu-nbd, spoken to through libnbd.

    imagectl --libnbd, one connection a thread--> qemu-nbd --> the descriptors of ``chain``

qemu-nbd is not persistent: it writes what it holds and ends when the last connection closes,
so also when imagectl is killed. Its socket is removed as soon as all connections are made; it
is called by the descriptor of its directory, for a socket's path has room for 107 bytes.

Nothing here waits inside of libnbd for longer than a turn: Ctrl-C reaches Python in between. At
the end qemu-nbd has some time to end by itself; a second Ctrl-C kills it.
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
except ModuleNotFoundError:  # all but qcow2 works without
    _HAS_LIBNBD = False
else:
    _HAS_LIBNBD = True

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import Buffer, local_errors
from imageserver.client.local.qcow2_chain import Chain, Member, OpenFile
from imageserver.client.local.qemu_programs import (
    END_SECONDS,
    as_filename,
    end,
    qemu_img,
    reason,
    start_nbd,
)
from imageserver.client.plan import GIB, Spans
from imageserver.core.extents import ALLOCATION, STATE_HOLE, STATE_ZERO

_START_SECONDS = 30.0
#: How long one wait in libnbd may take: signals' handlers run after it, and threads stop.
_TURN_MS = 500
#: For threads that wait to give up.
_STOP_SECONDS = 5.0
#: Requests' limits in the protocol are 32 bits: block status is asked in steps below that.
_STEP = 2 * GIB


class Qcow2:
    """An open image; its connections are shared by at most as many threads."""

    def __init__(self, chain: Chain, connections: int, *, writable: bool) -> None:
        """Serve ``chain``, which is this image's from now on, whatever comes."""
        self._chain = chain
        self._names = {file.fd: file.path for file in chain.files()}
        self.path = chain.members[0].file.path
        #: The first of the images that nobody writes.
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
        #: Memory that libnbd may still use, for requests that nobody waits for any more.
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
        """Make an image, an overlay of ``base`` if there is one.

        It is made in the file at ``path``, which must be ``ours`` if that is said; a symbolic
        link is not followed.
        """
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
        """Start qemu-nbd, and connect; ``failed`` ends it."""
        with contextlib.ExitStack() as undo, local_errors("a directory for a socket"):
            directory = tempfile.mkdtemp(prefix="imagectl-")
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, fd)
            filename = as_filename(self._chain.node(self._linked(directory)))
            sock, fds = f"/proc/self/fd/{fd}/nbd", [*self._names, fd]
            self._server = start_nbd(
                filename, sock, connections, fds, writable=bool(self._first_read)
            )
            failed.callback(end, self._server, kill=True)
            self._all = [self._connect(sock) for _ in range(connections)]

    def _linked(self, directory: str) -> dict[str, object] | None:
        """Return an image of ours, if any, that names what the chain names through a protocol.

        QEMU tells what such a name means only where an image has it, and in the chain's own
        it could be another by now.
        """
        if self._chain.beyond is None:
            return None
        name, kind = self._chain.beyond
        header, path = self._chain.members[-1].header, f"{directory}/link"
        backing = ("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", kind)
        qemu_img(*backing, path, str(header.size if header else 0), names={})
        return {"driver": "qcow2", "file": {"driver": "file", "filename": path}}

    def _connect(self, sock: str) -> "nbd.NBD":
        deadline = time.monotonic() + _START_SECONDS
        while True:
            handle = nbd.NBD()
            handle.add_meta_context(ALLOCATION)
            with contextlib.suppress(nbd.Error):  # it may not listen yet
                handle.aio_connect_unix(sock)
                while handle.aio_is_connecting() and time.monotonic() < deadline:
                    handle.poll(_TURN_MS)
                if handle.aio_is_ready():
                    return handle
            if self._server.poll() is not None:
                said = self._server.stderr.read() if self._server.stderr else ""
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
        """Wait until a request is complete, in turns; ``buffer`` is what it reads or writes."""
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
        """Return where the image and what it is based on have data."""
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
        """Zero a span; what it is based on shows through no more."""
        with self._handle() as handle:
            for offset in range(start, stop, _STEP):
                self._wait(handle, handle.aio_zero(min(_STEP, stop - offset), offset))

    def sync(self, within: float = math.inf) -> None:
        """Bring all of it to stable storage; give up after so many seconds."""
        with self._handle(within) as handle:
            self._wait(handle, handle.aio_flush(), within=within)

    def forget_cached(self) -> None:
        """Do nothing: qemu-nbd has the file open."""

    def require_unchanged(self) -> None:
        """Require what was only read to be as it was.

        Raises:
            LocalFailure: it was written or cut meanwhile: what was read may be anything.
        """
        self._chain.require_unchanged(self._first_read)

    def close(self) -> None:
        """Close all connections and wait for qemu-nbd's end; may be called twice."""
        self._close(kill=not self._first_read)  # what only reads has nothing to write at the end

    def abandon(self) -> None:
        """Kill qemu-nbd: what it holds is lost."""
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
        """Say good-bye on all connections; threads that wait give theirs back in a turn."""
        deadline = time.monotonic() + END_SECONDS
        for _ in range(connections):
            handle = self._taken(_STOP_SECONDS)
            with contextlib.suppress(nbd.Error):  # it is gone: that is what is wanted
                handle.aio_disconnect()
                while not handle.aio_is_closed():
                    if time.monotonic() > deadline:
                        raise self._silent()
                    handle.poll(_TURN_MS)


def _collect_into(said: list[int]) -> "Callable[[str, int, list[int], int], int]":
    def collect(context: str, _offset: int, entries: list[int], _error: int) -> int:
        if context == ALLOCATION:
            said.extend(entries)
        return 0

    return collect


def _create(base: Chain | None) -> list[str]:
    """Return qemu-img's arguments for a new image; what it is based on is not opened by name."""
    if base is None:
        return ["create", "-q", "-f", "qcow2"]
    top = base.members[0]
    full = os.path.join(os.getcwd(), top.file.path)  # its links left as they are
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
