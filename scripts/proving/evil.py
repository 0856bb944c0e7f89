# SPDX-License-Identifier: Apache-2.0
"""An NBD server that lies: each byte that it sends is another one, or the last one.

Lengths, handles, sizes, flags, magic numbers and data are all bytes of its stream, so that every
lie about one of them is among these. After each: no 200 whose body has another length than it
said, bytes in an image only where they were to be written, nothing held, no thread dead, and the
next request succeeds.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from lab.servers import nbdkit

from proving.sweep import Fault, NotPrepared, Operation, sweep
from proving.world import Answer, World

SIZE = 512
_OLD = bytes(range(256)) * 2
_NEW = _OLD[::-1]
_OK = 200
#: A busy machine may need more than the back-end timeout, which is short here.
_TRIES = 10
#: The server hangs up instead of sending the byte; or all, the least or the highest of its bits
#: are others.
CUT = 0
KINDS = (CUT, 0xFF, 0x01, 0x80)


class Proxy:
    """In front of an NBD server: one byte of all that it sends is changed, once."""

    def __init__(self, front: Path, server: Path) -> None:
        self._server = server
        self._nth, self._kind, self._is_done = 0, CUT, False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(front))
        self._listener.listen()
        self._start(self._accept)

    def arm(self, nth: int, kind: int) -> None:
        """Change the ``nth`` byte of a connection: of the first that has so many."""
        with self._lock:
            self._nth, self._kind, self._is_done = nth, kind, False

    def disarm(self) -> str:
        """Change nothing; return "byte" if one was changed."""
        with self._lock:
            self._nth = 0
            return "byte" if self._is_done else ""

    def _start(self, run: Callable[..., None], *what: socket.socket) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=run, args=what, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._server))
                self._start(self._pass_on, client, server)
                self._start(self._lie, server, client)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        _hang_up(server)

    def _lie(self, server: socket.socket, client: socket.socket) -> None:
        at = 0
        with server, client, contextlib.suppress(OSError):
            while data := server.recv(65536):
                lies = self._changed(data, at)
                client.sendall(lies)
                if len(lies) < len(data):
                    break
                at += len(data)
            _hang_up(client)
            _hang_up(server)

    def _changed(self, data: bytes, at: int) -> bytes:
        with self._lock:
            place = self._nth - 1 - at
            if self._is_done or not self._nth or not 0 <= place < len(data):
                return data
            self._is_done = True
            if self._kind == CUT:
                return data[:place]
            return data[:place] + bytes([data[place] ^ self._kind]) + data[place + 1 :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        _hang_up(self._listener)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _old(world: World) -> None:
    for _ in range(_TRIES):
        answer = world.ask("PUT", "/images/disk", _OLD)
        if answer.status == _OK:
            return
    raise NotPrepared(f"{answer.status} {answer.body!r}")


def _has_its_length(_world: World, answer: Answer) -> Iterator[str]:
    told = answer.headers.get("content-length")
    if answer.status == _OK and not answer.cut and told and int(told) != len(answer.body):
        yield f"200 with {len(answer.body)} of {told} bytes"


def _writes(wanted: bytes) -> Callable[[World, Answer], Iterator[str]]:
    def check(world: World, answer: Answer) -> Iterator[str]:
        yield from _has_its_length(world, answer)
        now = world.ask("GET", "/images/disk").body
        if answer.status == _OK and answer.json["bytes_written"] == SIZE and now != wanted:
            yield "200, and not all of it was written"
        if len(now) != SIZE or any(
            byte not in pair for byte, *pair in zip(now, _OLD, wanted, strict=True)
        ):
            yield f"{answer.status}, and there is what nobody has written"

    return check


def _sums(world: World, answer: Answer) -> Iterator[str]:
    """A flipped bit of the data is another checksum; whatever else was flipped is none."""
    yield from _has_its_length(world, answer)


_ZERO = json.dumps({"op": "zero", "offset": 0, "size": SIZE, "flush": True}).encode()
_JSON = {"Content-Type": "application/json"}
_QCOW2 = "/images/disk?format=qcow2&cluster_size=4096"
OPERATIONS = (
    Operation("GET", lambda w: w.ask("GET", "/images/disk"), _has_its_length, _old),
    Operation("PUT", lambda w: w.ask("PUT", "/images/disk?flush=y", _NEW), _writes(_NEW), _old),
    Operation(
        "zero", lambda w: w.ask("PATCH", "/images/disk", _ZERO, _JSON), _has_its_length, _old
    ),
    Operation("extents", lambda w: w.ask("GET", "/images/disk/extents"), _has_its_length, _old),
    Operation("checksum", lambda w: w.ask("GET", "/images/disk/checksum"), _sums, _old),
    Operation("OPTIONS", lambda w: w.ask("OPTIONS", "/images/disk"), _has_its_length, _old),
    Operation("qcow2", lambda w: w.ask("GET", _QCOW2), _has_its_length, _old),
)


@contextlib.contextmanager
def _with_disk(socket_path: Path) -> Iterator[World]:
    with World(backend_timeout=0.2) as world:
        world.add("disk", socket=str(socket_path))
        yield world


def run(
    directory: Path, kinds: Iterable[int] = KINDS, names: Iterable[str] = (), *, step: int = 1
) -> Iterator[Fault]:
    """Change each ``step``-th byte in turn, in all operations or those of these names."""
    front = directory / "evil.sock"
    with nbdkit(directory / "good.sock", "memory", str(SIZE)) as good, Proxy(front, good) as proxy:
        for operation in OPERATIONS:
            if not names or operation.name in names:
                for kind in kinds:
                    yield from sweep(operation, kind, proxy, lambda: _with_disk(front), step=step)
