# SPDX-License-Identifier: Apache-2.0
"""A local qcow2 image as one end of a transfer: a private qemu-nbd, spoken to through libnbd.

    imagectl --libnbd, one connection a thread--> qemu-nbd --> image

qemu-nbd is not persistent: it writes what it holds and ends when the last connection closes,
so also when imagectl is killed. Its socket is removed as soon as all connections are made.

An image may name other files or servers (``chain``), and what is written inside a raw image, by
a guest too, may look like one: formats are always said, never guessed. Paths are given in full:
``a:b`` would be read as protocol and name.
"""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Self

try:
    import nbd
except ModuleNotFoundError:  # all but qcow2 works without
    nbd = None

from imageserver.client.chain import require_formats
from imageserver.client.errors import LocalFailure
from imageserver.client.localfile import QCOW2_MAGIC, Buffer, local_errors
from imageserver.client.plan import GIB, Spans
from imageserver.extents import ALLOCATION, STATE_HOLE, STATE_ZERO

_START_SECONDS, _END_SECONDS = 30.0, 120.0
#: Requests' limits in the protocol are 32 bits: block status is asked in steps below that.
_STEP = 2 * GIB


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
    info = json.loads(qemu_img("info", "-U", "--output=json", "-f", kind, full))
    if info["virtual-size"] != size:
        raise LocalFailure(
            f"{path} has {info['virtual-size']} bytes, the image {size}: "
            "it is no earlier state of it"
        )
    return full, kind


class Qcow2:
    """An open image; its connections are shared by at most as many threads."""

    def __init__(self, path: str, connections: int, *, writable: bool) -> None:
        if nbd is None:
            raise LocalFailure(
                "qcow2 needs libnbd's module (python3-libnbd), which this Python has not"
            )
        self.path = path
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
            try:
                handle.connect_unix(sock)
            except nbd.Error as exc:
                if self._server.poll() is not None:
                    said = self._server.stderr.read() if self._server.stderr else ""
                    raise LocalFailure(_last_line(said) or f"{self.path}: no qemu-nbd") from exc
                if time.monotonic() > deadline:
                    raise LocalFailure(f"{self.path}: qemu-nbd does not answer") from exc
                time.sleep(0.01)
            else:
                return handle

    @contextlib.contextmanager
    def _handle(self) -> Iterator["nbd.NBD"]:
        handle = self._idle.get()
        try:
            yield handle
        except nbd.Error as exc:
            raise LocalFailure(f"{self.path}: {exc.string}") from exc
        finally:
            self._idle.put(handle)

    def spans(self) -> Spans:
        """Return where the image and what it is based on have data."""
        found, position = Spans(), 0
        with self._handle() as handle:
            while position < self.size:
                said: list[int] = []
                handle.block_status(min(_STEP, self.size - position), position, _collect_into(said))
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
            return bytes(handle.pread(length, start))

    def write(self, start: int, data: Buffer) -> None:
        """Write all of ``data``."""
        with self._handle() as handle:
            handle.pwrite(data, start)

    def zero(self, start: int, stop: int) -> None:
        """Zero a span; what it is based on shows through no more."""
        with self._handle() as handle:
            for offset in range(start, stop, _STEP):
                handle.zero(min(_STEP, stop - offset), offset)

    def sync(self) -> None:
        """Bring all of it to stable storage."""
        with self._handle() as handle:
            handle.flush()

    def forget_cached(self) -> None:
        """Do nothing: qemu-nbd has the file open."""

    def close(self) -> None:
        """Close all connections and wait for qemu-nbd's end; may be called twice."""
        handles, self._all = self._all, []
        for handle in handles:
            with contextlib.suppress(nbd.Error):
                handle.shutdown()
        if handles:
            _end(self._server)


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
        server.wait(_END_SECONDS)
    except subprocess.TimeoutExpired as exc:
        server.kill()
        server.wait()
        raise LocalFailure("qemu-nbd did not end") from exc
    finally:
        if server.stderr:
            server.stderr.close()


def _full(path: str) -> str:
    """Return the path from the root, its links left as they are."""
    return os.path.join(os.getcwd(), path)


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise LocalFailure(f"{name} is missing: qcow2 needs QEMU's tools (qemu-utils, qemu-img)")
    return path


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
