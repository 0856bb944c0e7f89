# SPDX-License-Identifier: Apache-2.0
"""A local qcow2 image as one end of a transfer: a private qemu-nbd, spoken to through libnbd.

    imagectl --libnbd, one connection a thread--> qemu-nbd --> image

qemu-nbd is not persistent: it writes what it holds and ends when the last connection closes,
so also when imagectl is killed. Its socket is removed as soon as all connections are made.

Nothing here waits inside of libnbd for longer than a turn: Ctrl-C reaches Python in between. At
the end qemu-nbd has some time to end by itself; a second Ctrl-C kills it.

An image may name other files or servers (``chain``), and what is written inside a raw image, by
a guest too, may look like one: formats are always said, never guessed. Paths are given in full:
``a:b`` would be read as protocol and name.
"""

import contextlib
import json
import math
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

try:
    import nbd
except ModuleNotFoundError:  # all but qcow2 works without
    nbd = None

from imageserver.client.chain import require_formats
from imageserver.client.errors import LocalFailure
from imageserver.client.localfile import QCOW2_MAGIC, Buffer, RawFile, local_errors
from imageserver.client.plan import GIB, Spans
from imageserver.extents import ALLOCATION, STATE_HOLE, STATE_ZERO

_START_SECONDS, _END_SECONDS = 30.0, 120.0
#: How long one wait in libnbd may take: signals' handlers run after it, and threads stop.
_TURN_MS = 500
#: For threads that wait to give up, and for a process that was killed to be gone.
_STOP_SECONDS = 5.0
#: Requests' limits in the protocol are 32 bits: block status is asked in steps below that.
_STEP = 2 * GIB
#: What an image is a whole multiple of, in bytes.
_SECTOR = 512


def qemu_img(*arguments: str) -> str:
    """Run qemu-img; return what it prints."""
    done = subprocess.run(  # noqa: S603 - a list, no shell
        [_program("qemu-img"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise LocalFailure(_last_line(done.stderr) or "qemu-img failed")
    return done.stdout


def checked_base(path: str, kind: str | None, size: int) -> tuple[str, str]:
    """Return an overlay's base, absolute, and its format: raw, unless qcow2 was said."""
    if kind is None:
        with local_errors(path), open(path, "rb") as file:
            if file.read(len(QCOW2_MAGIC)) == QCOW2_MAGIC:
                raise LocalFailure(
                    f"{path} looks like qcow2: say --base-format qcow2 if the disk in it is "
                    "the base, --base-format raw if the file is"
                )
    elif kind == "qcow2":
        require_formats(path)
    full, kind = _full(path), kind or "raw"
    if kind == "raw":  # of which qemu-img tells whole sectors
        with contextlib.closing(RawFile.open(path)) as file:
            has, wanted = file.size, size
    else:
        info = json.loads(qemu_img("info", "-U", "--output=json", "-f", kind, full))
        has, wanted = info["virtual-size"], -(-size // _SECTOR) * _SECTOR
    if has != wanted:
        raise LocalFailure(
            f"{path} has {has} bytes, the image {size}: it is no earlier state of it"
        )
    return full, kind


def refuse_below(base: str, file: str) -> None:
    """Refuse a qcow2 base that is itself based on the file to be written."""
    require_formats(base)
    chain = qemu_img("info", "-U", "--output=json", "--backing-chain", "-f", "qcow2", _full(base))
    for image in json.loads(chain):
        name = image["filename"]
        if os.path.exists(name) and os.path.samefile(name, file):
            raise LocalFailure(f"{base} is based on {file}: it can be no base of that")


class Qcow2:
    """An open image; its connections are shared by at most as many threads."""

    def __init__(self, path: str, connections: int, *, writable: bool) -> None:
        if nbd is None:
            raise LocalFailure(
                "qcow2 needs libnbd's module (python3-libnbd), which this Python has not"
            )
        self.path = path
        self._writable = writable
        with contextlib.ExitStack() as undo:
            directory = tempfile.mkdtemp(prefix="imagectl-")
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            self._server = _start(path, f"{directory}/nbd", connections + 1, writable=writable)
            failed = undo.enter_context(contextlib.ExitStack())
            failed.callback(_end, self._server, kill=True)
            self._all = [self._connect(f"{directory}/nbd") for _ in range(connections + 1)]
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
        cls, path: str, size: int, connections: int, base: tuple[str, str] | None = None
    ) -> Self:
        """Make an image, an overlay of ``base`` (its path and format) if there is one."""
        backing = ["-b", base[0], "-F", base[1]] if base else []
        qemu_img("create", "-q", "-f", "qcow2", *backing, _full(path), str(size))
        return cls(path, connections, writable=True)

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
                raise LocalFailure(_last_line(said) or f"{self.path}: no qemu-nbd")
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

    def close(self) -> None:
        """Close all connections and wait for qemu-nbd's end; may be called twice."""
        self._close(kill=not self._writable)  # what only reads has nothing to write at the end

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
            _end(self._server, kill=kill)

    def _hang_up(self, connections: int) -> None:
        """Say good-bye on all connections; threads that wait give theirs back in a turn."""
        deadline = time.monotonic() + _END_SECONDS
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


def _start(path: str, sock: str, shared: int, *, writable: bool) -> "subprocess.Popen[str]":
    command = [
        _program("qemu-nbd"),
        "--format=qcow2",
        f"--shared={shared}",
        f"--socket={sock}",
        *(["--discard=unmap"] if writable else ["--read-only"]),
        _full(path),
    ]
    return subprocess.Popen(  # noqa: S603 - a list, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the terminal's Ctrl-C is for imagectl, which ends it in order
    )


def _end(server: "subprocess.Popen[str]", *, kill: bool = False) -> None:
    if kill:
        server.kill()
    try:
        server.wait(_STOP_SECONDS if kill else _END_SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise LocalFailure("qemu-nbd did not end") from exc
    finally:
        server.kill()  # also where Ctrl-C has ended the waiting; of what has ended, nothing
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
        if server.stderr:
            server.stderr.close()


def _full(path: str) -> str:
    """Return the path from the root, its links left as they are."""
    return os.path.join(os.getcwd(), path)


def _program(name: str) -> str:
    # A Debian user's PATH has no /usr/sbin, where some distributions have servers.
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if path is None:
        raise LocalFailure(f"{name} is missing: qcow2 needs QEMU's tools (qemu-utils, qemu-img)")
    return path


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
