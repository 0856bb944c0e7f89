# SPDX-License-Identifier: Apache-2.0
"""What an NBD server sees of us: a proxy in front of real ones that counts and can be slow.

Run as a process of its own (``python proxy.py --readers 8 --writers 1 --chunk 262144
LISTEN=UPSTREAM ...``); on SIGTERM it prints one JSON line of what it has seen, and ends. It reads
the requests that pass and their replies (NBD protocol, "Transmission phase") and checks, over all
its sockets:

- connections with a read under way, whose client lives, are never more than readers (longer reads
  than a chunk do not count: of a server that is new, a write makes one, too);
- those with a write or zero under way are never more than writers;
- nobody writes an export while a connection of a dead client may still write there.

Connections with nothing under way do not count: they may be kept for the next request.

The third needs a window to look at: what a dead client has left in its socket is passed on
only after a pause, and its connection stays open until the server has done with it.
"""

import argparse
import contextlib
import fcntl
import json
import random
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

#: A request: magic, flags, type, cookie, offset, length. With extended headers, which libnbd
#: asks for since 1.18 and qemu-nbd grants since 8.2, the length has 64 bits.
_REQUESTS = {0x25609513: struct.Struct(">IHHQQI"), 0x21E41C71: struct.Struct(">IHHQQQ")}
_OPTION = struct.Struct(">8sII")
#: What a server sends: its greeting, replies to options, and replies to requests by their magic.
_GREETING_SIZE = 18
_OPTION_REPLY = struct.Struct(">8sIII")
_SIMPLE, _CHUNK, _EXTENDED = 0x67446698, 0x668E33EF, 0x6E8A278C
#: Each: magic, flags (or an error), cookie, length; without one it is that of the request.
_REPLIES = {
    _SIMPLE: struct.Struct(">IIQ"),
    _CHUNK: struct.Struct(">IHxxQI"),
    _EXTENDED: struct.Struct(">IHxxQ8xQ"),
}
_DONE = 1
#: With extended headers: this request has a payload, of ``length`` bytes.
_HAS_PAYLOAD = 1 << 5
_READ, _WRITE, _DISCONNECT, _ZERO = 0, 1, 2, 6
_PIECE = 256 * 1024


class Watch:
    """Who reads and writes, over all connections."""

    def __init__(self, readers: int, writers: int) -> None:
        self._limits = {"readers": readers, "writers": writers}
        self._lock = threading.Lock()
        self._links: list[Link] = []
        self.peaks = {"readers": 0, "writers": 0}
        self.waits = 0
        self.violations: list[str] = []

    def begins(self, link: "Link") -> None:
        """Note a connection."""
        with self._lock:
            self._links.append(link)

    def uses(self, link: "Link", kind: str, cookie: int) -> None:
        """Note that ``link`` asks to read or write."""
        with self._lock:
            if link.is_over:
                return
            link.under_way[cookie] = kind
            using = [each for each in self._links if kind in each.under_way.values()]
            alive = sum(each.has_client() for each in using)
            self.peaks[kind] = max(self.peaks[kind], alive)
            if alive > self._limits[kind]:
                self._violated(f"{alive} {kind} at once")
            if kind == "writers":
                self._writes(link)

    def _writes(self, link: "Link") -> None:
        link.has_written = True
        if link.is_overtaken:
            self._violated(f"{link.export}: a dead client's write after a successor's")
        for other in self._links:
            if other is not link and other.export == link.export and not other.has_client():
                if "writers" in other.under_way.values():
                    self._violated(f"{link.export}: written while a dead client's may land")
                # What it has left may be a read.
                other.is_overtaken = other.has_left_something()

    def _violated(self, text: str) -> None:
        self.violations.append(f"{time.monotonic():.3f} {text}")

    def answered(self, link: "Link", cookie: int) -> None:
        """Note that the server has done what ``link`` asked for."""
        with self._lock:
            link.under_way.pop(cookie, None)

    def is_done(self, link: "Link", *, died: bool) -> None:
        """Note that ``link`` has said good-bye, or that the server has closed it."""
        with self._lock:
            if link in self._links:
                self._links.remove(link)
                self.waits += died and link.has_written

    def report(self) -> str:
        """Return what was seen, as a line of JSON."""
        seen = {"peaks": self.peaks, "dead_writers": self.waits, "violations": self.violations}
        return json.dumps(seen)


class Link:
    """One connection: the client's side, and the server's."""

    def __init__(
        self, client: socket.socket, export: str, watch: Watch, *, chunk: int, lag: float
    ) -> None:
        """``chunk``: no client's read is longer, in bytes."""
        self.export = export
        self._chunk = chunk
        self._client = client
        self._upstream = socket.socket(socket.AF_UNIX)
        self._watch = watch
        self._lag = lag
        self._sent = Stream(client.recv)
        self._lengths: dict[int, int] = {}
        self._closed = False
        #: The server has closed: whatever it has not done by then, it will not do.
        self.is_over = False
        #: Readers' and writers' requests that have no reply yet, by their cookies.
        self.under_way: dict[int, str] = {}
        self.has_written = False
        #: Another has written since, though this one's dead client had left something.
        self.is_overtaken = False

    def has_client(self) -> bool:
        """Tell whether the client's end is open: POLLHUP says that it was closed (unix(7))."""
        if self._closed:
            return False
        poll = select.poll()
        poll.register(self._client, 0)
        return not any(events & select.POLLHUP for _, events in poll.poll(0))

    def has_left_something(self) -> bool:
        """Tell whether the client has sent what was not passed on yet."""
        unread = bytearray(4)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._client, termios.FIONREAD, unread)
        return bool(self._sent.buffer) or any(unread)

    def run(self) -> None:
        """Pass everything on until both sides have done."""
        try:
            self._upstream.connect(self.export)
        except OSError:
            self._client.close()
            return
        self._watch.begins(self)
        back = threading.Thread(target=self._answer, daemon=True)
        back.start()
        self._request()
        back.join()
        self._closed = True
        self._client.close()
        self._upstream.close()

    # From the server

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            for data in self._replies(Stream(self._upstream.recv)):
                with contextlib.suppress(OSError):  # a dead client: the server still gets to end
                    self._client.sendall(data)
        self.is_over = True
        self._watch.is_done(self, died=not self.has_client())
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)

    def _replies(self, said: "Stream") -> Iterator[bytes]:
        """Yield what the server sends; a request's end is noted before the client knows of it."""
        yield said.take(_GREETING_SIZE)
        while head := said.take(4):
            if layout := _REPLIES.get(int.from_bytes(head, "big")):
                yield from self._reply(layout, head + said.take(layout.size - 4), said)
            else:
                head += said.take(_OPTION_REPLY.size - 4)
                yield head + said.take(_OPTION_REPLY.unpack(head)[3])

    def _reply(self, layout: struct.Struct, head: bytes, said: "Stream") -> Iterator[bytes]:
        magic, flags, cookie, *lengths = layout.unpack(head)
        if magic == _SIMPLE:  # the flags are an error
            left, is_last = 0 if flags else self._lengths.get(cookie, 0), True
        else:
            left, is_last = lengths[0], bool(flags & _DONE)
        while left > _PIECE:
            yield head + said.take(_PIECE)
            head, left = b"", left - _PIECE
        head += said.take(left)
        if is_last:
            self._lengths.pop(cookie, None)
            self._watch.answered(self, cookie)
        yield head

    # From the client

    def _request(self) -> None:
        with contextlib.suppress(OSError):  # a client may die in the midst of a request
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
        yield self._sent.take(4)  # client flags
        while head := self._sent.take(4):
            if layout := _REQUESTS.get(int.from_bytes(head, "big")):
                yield from self._command(layout, head + self._sent.take(layout.size - 4))
            else:
                head += self._sent.take(_OPTION.size - 4)
                yield head + self._sent.take(_OPTION.unpack(head)[2])

    def _command(self, layout: struct.Struct, head: bytes) -> Iterator[bytes]:
        _, flags, kind, cookie, _, length = layout.unpack(head)
        if kind == _READ:
            self._lengths[cookie] = length
            if length <= self._chunk:
                self._watch.uses(self, "readers", cookie)
        elif kind in {_WRITE, _ZERO}:
            self._watch.uses(self, "writers", cookie)
        elif kind == _DISCONNECT:
            self._watch.is_done(self, died=False)
        yield head
        left = length if kind == _WRITE or flags & _HAS_PAYLOAD else 0
        while left and (data := self._sent.take(min(left, _PIECE))):
            left -= len(data)
            yield data


class Stream:
    """What one side sends, in pieces as they are asked for."""

    def __init__(self, recv: Callable[[int], bytes]) -> None:
        self._recv = recv
        self.buffer = bytearray()

    def take(self, size: int) -> bytes:
        """Return ``size`` bytes; nothing at the end, and OSError at an end in between."""
        while len(self.buffer) < size:
            data = self._recv(_PIECE)
            if not data:
                if not self.buffer:
                    return b""
                raise ConnectionResetError
            self.buffer += data
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken


def _listen(path: str, upstream: str, watch: Watch, chunk: int, lag: float) -> None:
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    jitter = random.Random(path)

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            pause = lag * jitter.random() if lag < 1 else lag
            link = Link(client, upstream, watch, chunk=chunk, lag=pause)
            threading.Thread(target=link.run, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser("proxy.py")
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--writers", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=1 << 20, help="bytes")
    parser.add_argument("--lag", type=float, default=0.05, help="seconds; below 1: at most")
    parser.add_argument("pairs", nargs="+", metavar="LISTEN=UPSTREAM")
    arguments = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    watch = Watch(arguments.readers, arguments.writers)
    for pair in arguments.pairs:
        listen, _, upstream = pair.partition("=")
        _listen(listen, upstream, watch, arguments.chunk, arguments.lag)
    signal.sigwait({signal.SIGTERM})
    sys.stdout.write(watch.report() + "\n")


if __name__ == "__main__":
    main()
