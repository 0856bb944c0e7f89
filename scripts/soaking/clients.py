# SPDX-License-Identifier: Apache-2.0
"""The clients of the storm. Each is a thread with a random source of its own.

Whoever writes waits for ``100 Continue`` first, and vanishes only with its body unfinished:
so the server never has two writes of one client at once, and the model stays exact.
"""

import contextlib
import json
import random
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator

from lab.model import check_extents, pattern
from lab.wire import Answer, Cut, Hanging, Wire

from soaking.backends import SIZE, Image
from soaking.chaos import Trace

#: Longer than every timeout of the server in the storm: what is slower than this hangs.
PATIENCE_SECONDS = 40.0
_TRY_LATER = {409, 503}
_EXCUSED_BY_OUTAGE = {500, 504}
_CONTINUE, _OK = 100, 200
_DONE = {_OK, 206}
_PIECE = 256 << 10
#: Likelihoods: that a connection is not kept, a read is of a range, a client vanishes in the
#: middle, a zeroing asks for a flush.
_DROPPED, _RANGED, _VANISHING, _FLUSHED = 0.3, 0.6, 0.1, 0.3


class Client(threading.Thread):
    """Does one thing after another until told to stop; ``images``: with which."""

    def __init__(self, name: str, port: int, trace: Trace, seed: str, images: list[Image]) -> None:
        super().__init__(name=name, daemon=True)
        self._port = port
        self._images = images
        self._ended = threading.Event()
        self._wire: Wire | None = None
        self._began = self._since = 0.0
        self.trace = trace
        self.choose = random.Random(f"{seed} {name}")

    def stop(self) -> None:
        """Tell it to end soon."""
        self._ended.set()

    def run(self) -> None:
        """Act until told to stop."""
        try:
            while not self._ended.is_set():
                self.act(self.choose.choice(self._images))
        except Exception as exc:  # noqa: BLE001 - whatever it is, the soak has failed
            self.fail(f"{type(exc).__name__}: {exc}")
        finally:
            self.drop()

    @abstractmethod
    def act(self, image: Image) -> None:
        """Make one request."""

    def fail(self, text: str) -> None:
        """Make the soak fail."""
        self.trace.fail(f"{self.name}: {text}")

    def pause(self, least: float, most: float) -> None:
        """Wait some seconds, or to the end."""
        self._ended.wait(self.choose.uniform(least, most))

    @contextlib.contextmanager
    def exchange(self, image: Image, what: str) -> Iterator[Wire]:
        """Yield a connection for one request; an error without a cause makes the soak fail."""
        # A kept connection may have been cut since its last request was sent.
        now = time.monotonic()
        self._since = now if self._wire is None else self._began
        self._began = now
        try:
            if self._wire is None:
                self._wire = Wire(self._port, PATIENCE_SECONDS)
            yield self._wire
        except Cut as exc:
            self.drop()
            # The storm may have cut the connection, or failed the image.
            trace, since = self.trace, self._since
            if not (trace.is_killed_since(since) or trace.is_out_since(image.name, since)):
                self.fail(f"{what} {image.name}: cut without a cause: {exc}")
        except Hanging as exc:
            self.drop()
            self.fail(f"{what} {image.name}: hangs: {exc}")
        except BaseException:
            self.drop()
            raise

    def settle(self, image: Image, what: str, answer: Answer) -> None:
        """Count an answer that has been taken whole; judge its status."""
        status = answer.status
        self.trace.counts[f"{what} {status}"] += 1
        if status in _EXCUSED_BY_OUTAGE:
            if not self.trace.is_out_since(image.name, self._began):
                self.fail(f"{what} {image.name}: {status} without a cause")
        elif status in _TRY_LATER:
            self.pause(0, 0.05)
        elif status not in _DONE:
            self.fail(f"{what} {image.name}: {status}")
        if answer.fields.get("connection") == "close" or self.choose.random() < _DROPPED:
            self.drop()

    def drop(self) -> None:
        """Close the connection."""
        wire, self._wire = self._wire, None
        if wire:
            wire.__exit__()

    def vanish(self, wire: Wire) -> None:
        """Close the connection with a reset, in the middle of a request."""
        wire.vanish()
        self.drop()


class Reader(Client):
    """Reads images and ranges of them, at various speeds, to the end or not."""

    def act(self, image: Image) -> None:
        """Read once."""
        choose, start, stop = self.choose, 0, SIZE
        fields = {}
        if choose.random() < _RANGED:
            start = choose.randrange(SIZE)
            stop = min(SIZE, start + choose.choice((1, 4096, 70_000, 3 << 20)))
            fields = {"Range": f"bytes={start}-{stop - 1}"}
        with image.model.reading(start, stop) as read, self.exchange(image, "GET") as wire:
            try:
                wire.ask("GET", f"/images/{image.name}", fields)
                head = wire.head()
                if head.status in _DONE and choose.random() < _VANISHING:
                    self.vanish(wire)
                    return
                body = wire.body(head, pause=choose.choice((0, 0, 0, 0.005)))
            except Cut as exc:
                image.model.check(read, exc.body)
                raise
            if head.status in _DONE:
                if len(body) != stop - start:
                    self.fail(f"GET {image.name}: {len(body)} of {stop - start} bytes")
                image.model.check(read, body)
            self.settle(image, "GET", Answer(head.status, head.fields, body))


class Writer(Client):
    """The only writer of one image."""

    def act(self, image: Image) -> None:
        """Write, zero or flush once."""
        choose = self.choose
        self.pause(0, 0.02)
        kind = choose.choice(("PUT", "PATCH", "PATCH", "zero", "flush"))
        if not image.is_nbd:
            kind = choose.choice(("PUT", "flush"))
        if kind == "flush":
            with self.exchange(image, "flush") as wire:
                wire.ask("POST", f"/images/{image.name}/flush")
                self.settle(image, "flush", wire.answer())
        elif kind == "PUT":
            self._write(image, "PUT", 0, pattern(choose, SIZE))
        else:
            start = choose.randrange(SIZE)
            size = min(SIZE - start, choose.choice((1, 512, 65_536, 1_000_000, 4 << 20)))
            data = bytes(size) if kind == "zero" else pattern(choose, size)
            self._write(image, kind, start, data)

    def _write(self, image: Image, kind: str, start: int, data: bytes) -> None:
        self._sent = 0
        with image.model.writing(start, data) as write:
            with self.exchange(image, kind) as wire:
                send = self._zero if kind == "zero" else self._upload
                answer = send(wire, image, kind, start, data)
                if answer and answer.status in _TRY_LATER:
                    write.done = None
                elif answer and answer.status == _OK:
                    write.done = True
                if answer:
                    self.settle(image, kind, answer)
            if image.model.is_whole and write.done is False and self._sent < len(data):
                write.done = None  # a body that was cut short replaces nothing

    def _upload(
        self, wire: Wire, image: Image, kind: str, start: int, data: bytes
    ) -> Answer | None:
        """Send data; None after having vanished in the middle."""
        choose, stop = self.choose, len(data)
        fields = {"Content-Length": str(stop), "Expect": "100-continue"}
        if kind == "PATCH":
            fields["Range"] = f"bytes={start}-{start + stop - 1}"
        wire.ask(kind, f"/images/{image.name}", fields)
        if (head := wire.head()).status != _CONTINUE:
            return Answer(head.status, head.fields, wire.body(head))
        vanishes = choose.random() < _VANISHING
        if vanishes:
            stop = choose.randrange(stop)
        pause = choose.choice((0, 0, 0, 0.01))
        while self._sent < stop:
            wire.send(data[self._sent : min(stop, self._sent + _PIECE)])
            self._sent = min(stop, self._sent + _PIECE)
            time.sleep(pause)
        if vanishes:
            self.trace.counts[f"{kind} abandoned"] += 1
            self.vanish(wire)
            return None
        return wire.answer()

    def _zero(self, wire: Wire, image: Image, _kind: str, start: int, data: bytes) -> Answer:
        flush = self.choose.random() < _FLUSHED
        body = json.dumps({"op": "zero", "offset": start, "size": len(data), "flush": flush})
        fields = {"Content-Type": "application/json"}
        wire.ask("PATCH", f"/images/{image.name}", fields, body.encode())
        return wire.answer()


class Surveyor(Client):
    """Asks for extents, and checks that what is said to be zero may be."""

    def act(self, image: Image) -> None:
        """List extents once."""
        self.pause(0, 0.2)
        with image.model.reading(0, SIZE) as read, self.exchange(image, "extents") as wire:
            wire.ask("GET", f"/images/{image.name}/extents")
            answer = wire.answer()
            if answer.status == _OK:
                check_extents(answer.json, image.model, read, dirty=False)
            self.settle(image, "extents", answer)


class Prober(Client):
    """Probes as a load balancer does; must be neither refused nor late."""

    def __init__(self, name: str, port: int, trace: Trace, seed: str, images: list[Image]) -> None:
        super().__init__(name, port, trace, seed, images)
        self.seconds: list[float] = []

    def act(self, image: Image) -> None:
        """Probe once."""
        self._ended.wait(0.02)
        began = time.monotonic()
        with self.exchange(image, "OPTIONS") as wire:
            wire.ask("OPTIONS", f"/images/{image.name}")
            answer = wire.answer()
            self.seconds.append(time.monotonic() - began)
            if answer.status != _OK:
                self.fail(f"OPTIONS {image.name}: {answer.status}")
            self.settle(image, "OPTIONS", answer)


class Caller(Client):
    """Makes one request after another of an image that only it writes.

    It waits up to ``idle`` seconds between two, and may keep its connection all the time.
    """

    idle = 0.0
    is_keeping = False

    def __init__(self, name: str, port: int, trace: Trace, seed: str, images: list[Image]) -> None:
        super().__init__(name, port, trace, seed, images)
        self._content = bytes(SIZE)

    def act(self, image: Image) -> None:
        """Make one request."""
        self.pause(0, self.idle)
        kind = self.choose.choice(("OPTIONS", "GET", "GET", "PUT"))
        with self.exchange(image, kind) as wire:
            self._content = pattern(self.choose, SIZE) if kind == "PUT" else self._content
            wire.ask(kind, f"/images/{image.name}", {}, self._content if kind == "PUT" else b"")
            answer = wire.answer()
            self.trace.counts[f"{kind} {answer.status}"] += 1
            if answer.status != _OK:
                self.fail(f"{kind} {image.name}: {answer.status} {answer.body!r}")
            elif kind == "GET" and answer.body != self._content:
                self.fail(f"GET {image.name}: wrong bytes")
            if answer.fields.get("connection") == "close" or not self.is_keeping:
                self.drop()


def end(clients: Iterable[Client], trace: Trace) -> None:
    """Have them end; whoever does not makes the soak fail."""
    for client in clients:
        client.stop()
    deadline = time.monotonic() + PATIENCE_SECONDS + 5
    for client in clients:
        client.join(max(0.0, deadline - time.monotonic()))
        if client.is_alive():
            trace.fail(f"{client.name} does not end")
