# SPDX-License-Identifier: Apache-2.0
"""What an NBD server sees of us: a proxy in front of real ones that counts and can be slow.

Run as a process of its own (``python proxy.py --readers 8 --writers 1 LISTEN=UPSTREAM ...``);
on SIGTERM it prints one JSON line of what it has seen, and ends. It reads the requests that
pass (NBD protocol, "Transmission phase") and checks, over all its sockets:

- connections that have asked to read, and whose client lives, are never more than readers;
- those that have asked to write or zero are never more than writers;
- nobody writes an export while a connection of a dead client may still write there.

The third needs a window to look at: what a dead client has left in its socket is passed on
only after a pause, and its connection stays open until the server has done with it.
"""

import argparse
import contextlib
import json
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

#: A request: magic, flags, type, cookie, offset, length. With extended headers, which libnbd
#: asks for since 1.18 and qemu-nbd grants since 8.2, the length has 64 bits.
_REQUESTS = {0x25609513: struct.Struct(">IHHQQI"), 0x21E41C71: struct.Struct(">IHHQQQ")}
_OPTION = struct.Struct(">8sII")
#: With extended headers: this request has a payload, of ``length`` bytes.
_HAS_PAYLOAD = 1 << 5
_READ, _WRITE, _DISCONNECT, _ZERO = 0, 1, 2, 6
_PIECE = 256 * 1024


class Watch:
    """Who reads and writes, over all connections."""

    def __init__(self, readers: int, writers: int) -> None:
        self._limits = {"readers": readers, "writers": writers}
        self._lock = threading.Lock()
        self._using: dict[str, list[Link]] = {"readers": [], "writers": []}
        self.peaks = {"readers": 0, "writers": 0}
        self.waits = 0
        self.violations: list[str] = []

    def uses(self, link: "Link", kind: str) -> None:
        """Note that ``link`` reads or writes."""
        with self._lock:
            using = self._using[kind]
            if link in using or link.is_over:
                return
            using.append(link)
            alive = [other for other in using if other.has_client()]
            self.peaks[kind] = max(self.peaks[kind], len(alive))
            if len(alive) > self._limits[kind]:
                self._violated(f"{len(alive)} {kind} at once")
            if kind == "writers":
                for other in using:
                    if other.export == link.export and not other.has_client():
                        self._violated(f"{link.export}: written while a dead client's may land")

    def _violated(self, text: str) -> None:
        self.violations.append(f"{time.monotonic():.3f} {text}")

    def is_done(self, link: "Link", *, died: bool) -> None:
        """Note that ``link`` has said good-bye, or that the server has closed it."""
        with self._lock:
            self.waits += died and link in self._using["writers"]
            for using in self._using.values():
                with contextlib.suppress(ValueError):
                    using.remove(link)

    def report(self) -> str:
        """Return what was seen, as a line of JSON."""
        seen = {"peaks": self.peaks, "dead_writers": self.waits, "violations": self.violations}
        return json.dumps(seen)


class Link:
    """One connection: the client's side, and the server's."""

    def __init__(self, client: socket.socket, export: str, watch: Watch, lag: float) -> None:
        self.export = export
        self._client = client
        self._upstream = socket.socket(socket.AF_UNIX)
        self._watch = watch
        self._lag = lag
        self._buffer = bytearray()
        self._closed = False
        #: The server has closed: whatever it has not done by then, it will not do.
        self.is_over = False

    def has_client(self) -> bool:
        """Tell whether the client's end is open: POLLHUP says that it was closed (unix(7))."""
        if self._closed:
            return False
        poll = select.poll()
        poll.register(self._client, 0)
        return not any(events & select.POLLHUP for _, events in poll.poll(0))

    def run(self) -> None:
        """Pass everything on until both sides have done."""
        try:
            self._upstream.connect(self.export)
        except OSError:
            self._client.close()
            return
        back = threading.Thread(target=self._answer, daemon=True)
        back.start()
        self._request()
        back.join()
        self._closed = True
        self._client.close()
        self._upstream.close()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._upstream.recv(_PIECE):
                with contextlib.suppress(OSError):  # a dead client: the server still gets to end
                    self._client.sendall(data)
        self.is_over = True
        self._watch.is_done(self, died=not self.has_client())
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)

    def _request(self) -> None:
        with contextlib.suppress(OSError):
            for data in self._pieces():
                self._linger()
                self._upstream.sendall(data)
            self._linger()
        with contextlib.suppress(OSError):
            self._upstream.shutdown(socket.SHUT_WR)

    def _linger(self) -> None:
        if self._lag and not self.has_client():
            time.sleep(self._lag)
            self._lag = 0

    def _pieces(self) -> Iterator[bytes]:
        """Yield what the client sends, each request noted before it is passed on."""
        yield self._take(4)  # client flags
        while head := self._take(4):
            if layout := _REQUESTS.get(int.from_bytes(head, "big")):
                yield from self._command(layout, head + self._take(layout.size - 4))
            else:
                head += self._take(_OPTION.size - 4)
                yield head + self._take(_OPTION.unpack(head)[2])

    def _command(self, layout: struct.Struct, head: bytes) -> Iterator[bytes]:
        _, flags, kind, _, _, length = layout.unpack(head)
        if kind == _READ:
            self._watch.uses(self, "readers")
        elif kind in {_WRITE, _ZERO}:
            self._watch.uses(self, "writers")
        elif kind == _DISCONNECT:
            self._watch.is_done(self, died=False)
        yield head
        left = length if kind == _WRITE or flags & _HAS_PAYLOAD else 0
        while left and (data := self._take(min(left, _PIECE))):
            left -= len(data)
            yield data

    def _take(self, size: int) -> bytes:
        """Return ``size`` bytes; nothing at the end, and OSError at an end in between."""
        while len(self._buffer) < size:
            data = self._client.recv(_PIECE)
            if not data:
                if not self._buffer:
                    return b""
                raise ConnectionResetError
            self._buffer += data
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def _listen(path: str, upstream: str, watch: Watch, lag: float) -> None:
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    jitter = random.Random(path)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            link = Link(client, upstream, watch, lag * jitter.random() if lag < 1 else lag)
            threading.Thread(target=link.run, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser("proxy.py")
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--lag", type=float, default=0.05, help="seconds; below 1: at most")
    parser.add_argument("pairs", nargs="+", metavar="LISTEN=UPSTREAM")
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    watch = Watch(arguments.readers, arguments.writers)
    for pair in arguments.pairs:
        listen, _, upstream = pair.partition("=")
        _listen(listen, upstream, watch, arguments.lag)
    signal.sigwait({signal.SIGTERM})
    sys.stdout.write(watch.report() + "\n")


if __name__ == "__main__":
    main()
