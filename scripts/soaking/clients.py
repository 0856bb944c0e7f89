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
from collections.abc import Iterator

from backends import SIZE, Image
from chaos import Trace
from model import WrongBytes
from wire import Answer, Cut, Hanging, Wire, pattern

_TRY_LATER = {409, 503}
_EXCUSED_BY_OUTAGE = {500, 504}


class Client(threading.Thread):
    """Does one thing after another until told to stop."""

    def __init__(self, name: str, port: int, trace: Trace, seed: str) -> None:
        super().__init__(name=name, daemon=True)
        self._port = port
        self.trace = trace
        self.choose = random.Random(f"{seed} {name}")  # noqa: S311 - to be repeatable
        self._ended = threading.Event()
        self._wire: Wire | None = None
        self._began = 0.0
        self._since = 0.0

    def stop(self) -> None:
        """Tell it to end soon."""
        self._ended.set()

    def run(self) -> None:
        """Act until told to stop."""
        try:
            while not self._ended.is_set():
                self.act()
        except Exception as exc:  # noqa: BLE001 - whatever it is, the soak has failed
            self.fail(f"{type(exc).__name__}: {exc}")
        finally:
            self.drop()

    @abstractmethod
    def act(self) -> None:
        """Make one request."""

    def fail(self, text: str) -> None:
        """Make the soak fail."""
        self.trace.fail(f"{self.name}: {text}")

    @contextlib.contextmanager
    def exchange(self, image: Image, what: str) -> Iterator[Wire]:
        """Lend a connection for one request; judge what breaks it."""
        # A kept connection may have been cut since its last request was sent.
        now = time.monotonic()
        self._since = now if self._wire is None else self._began
        self._began = now
        try:
            if self._wire is None:
                self._wire = Wire(self._port)
            yield self._wire
        except Cut as exc:
            self.drop()
            if not self.is_excused(image):
                self.fail(f"{what} {image.name}: cut without a cause: {exc}")
        except Hanging as exc:
            self.drop()
            self.fail(f"{what} {image.name}: hangs: {exc}")
        except BaseException:
            self.drop()
            raise

    def is_excused(self, image: Image) -> bool:
        """Tell whether the storm may have cut the connection, or failed the image."""
        trace, since = self.trace, self._since
        return trace.is_killed_since(since) or trace.is_out_since(image.name, since)

    def settle(self, image: Image, what: str, status: int, fields: dict[str, str]) -> None:
        """Count an answer that has been taken whole; judge its status."""
        self.trace.counts[f"{what} {status}"] += 1
        if status in _EXCUSED_BY_OUTAGE:
            if not self.trace.is_out_since(image.name, self._began):
                self.fail(f"{what} {image.name}: {status} without a cause")
        elif status in _TRY_LATER:
            self._ended.wait(self.choose.uniform(0, 0.05))
        elif status not in {200, 206}:
            self.fail(f"{what} {image.name}: {status}")
        if fields.get("connection") == "close" or self.choose.random() < 0.3:  # noqa: PLR2004
            self.drop()

    def drop(self) -> None:
        """Close the connection."""
        wire, self._wire = self._wire, None
        if wire:
            wire.__exit__()


class Reader(Client):
    """Reads images and ranges of them, at various speeds, to the end or not."""

    def __init__(self, *args: object, images: list[Image]) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._images = images

    def act(self) -> None:
        """Read once."""
        choose = self.choose
        image = choose.choice(self._images)
        start, stop = 0, SIZE
        fields = {}
        if choose.random() < 0.6:  # noqa: PLR2004
            start = choose.randrange(SIZE)
            stop = min(SIZE, start + choose.choice((1, 4096, 70_000, 3 << 20)))
            fields = {"Range": f"bytes={start}-{stop - 1}"}
        read = image.model.begin_read(start, stop)
        try:
            with self.exchange(image, "GET") as wire:
                try:
                    wire.ask("GET", f"/images/{image.name}", fields)
                    status, answer = wire.head()
                    if status in {200, 206} and choose.random() < 0.1:  # noqa: PLR2004
                        wire.vanish()
                        self.drop()
                        return
                    body = wire.body(answer, choose.choice((0, 0, 0, 0.005)))
                except Cut as exc:
                    image.model.check(read, exc.body)
                    raise
                if status in {200, 206}:
                    if len(body) != stop - start:
                        self.fail(f"GET {image.name}: {len(body)} of {stop - start} bytes")
                    image.model.check(read, body)
                self.settle(image, "GET", status, answer)
        finally:
            image.model.end_read(read)


class Writer(Client):
    """The only writer of one image."""

    def __init__(self, *args: object, image: Image) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._image = image

    def act(self) -> None:
        """Write, zero or flush once."""
        choose = self.choose
        self._ended.wait(choose.uniform(0, 0.02))
        kind = choose.choice(("PUT", "PATCH", "PATCH", "zero", "flush"))
        if not self._image.is_nbd:
            kind = choose.choice(("PUT", "flush"))
        if kind == "flush":
            with self.exchange(self._image, "flush") as wire:
                wire.ask("POST", f"/images/{self._image.name}/flush")
                answer = wire.answer()
                self.settle(self._image, "flush", answer.status, answer.fields)
        elif kind == "PUT":
            self._write("PUT", 0, pattern(choose, SIZE))
        else:
            start = choose.randrange(SIZE)
            size = min(SIZE - start, choose.choice((1, 512, 65_536, 1_000_000, 4 << 20)))
            self._write(kind, start, bytes(size) if kind == "zero" else pattern(choose, size))

    def _write(self, kind: str, start: int, data: bytes) -> None:
        model = self._image.model
        write = model.begin_write(start, data)
        done: bool | None = False
        self._sent = 0
        try:
            with self.exchange(self._image, kind) as wire:
                send = self._zero if kind == "zero" else self._upload
                answer = send(wire, kind, start, data)
                if answer is None:
                    return
                if answer.status in _TRY_LATER:
                    done = None
                elif answer.status == 200:  # noqa: PLR2004
                    done = True
                self.settle(self._image, kind, answer.status, answer.fields)
        finally:
            if model.is_whole and done is False and self._sent < len(data):
                done = None  # a body that was cut short replaces nothing
            model.end_write(write, done=done)

    def _upload(self, wire: Wire, kind: str, start: int, data: bytes) -> Answer | None:
        """Send data; None after having vanished in the middle."""
        fields = {"Content-Length": str(len(data)), "Expect": "100-continue"}
        if kind == "PATCH":
            fields["Range"] = f"bytes={start}-{start + len(data) - 1}"
        wire.ask(kind, f"/images/{self._image.name}", fields)
        status, answer = wire.head()
        if status != 100:  # noqa: PLR2004
            return Answer(status, answer, wire.body(answer))
        stop = len(data)
        vanishes = self.choose.random() < 0.1  # noqa: PLR2004
        if vanishes:
            stop = self.choose.randrange(len(data))
        pause = self.choose.choice((0, 0, 0, 0.01))
        while self._sent < stop:
            wire.send(data[self._sent : min(stop, self._sent + (256 << 10))])
            self._sent = min(stop, self._sent + (256 << 10))
            time.sleep(pause)
        if vanishes:
            self.trace.counts[f"{kind} abandoned"] += 1
            wire.vanish()
            self.drop()
            return None
        return wire.answer()

    def _zero(self, wire: Wire, _kind: str, start: int, data: bytes) -> Answer:
        flush = self.choose.random() < 0.3  # noqa: PLR2004
        body = json.dumps({"op": "zero", "offset": start, "size": len(data), "flush": flush})
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        wire.ask("PATCH", f"/images/{self._image.name}", fields)
        wire.send(body.encode())
        return wire.answer()


class Surveyor(Client):
    """Asks for extents, and checks that what is said to be zero may be."""

    def __init__(self, *args: object, images: list[Image]) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._images = images

    def act(self) -> None:
        """List extents once."""
        image = self.choose.choice(self._images)
        self._ended.wait(self.choose.uniform(0, 0.2))
        read = image.model.begin_read(0, SIZE)
        try:
            with self.exchange(image, "extents") as wire:
                wire.ask("GET", f"/images/{image.name}/extents")
                answer = wire.answer()
                if answer.status == 200:  # noqa: PLR2004
                    end = 0
                    for extent in answer.json:
                        if extent["start"] != end:
                            raise WrongBytes(f"extents: a gap at {end}")
                        end += extent["length"]
                        if extent["zero"]:
                            image.model.check_zero(read, extent["start"], end)
                    if end != SIZE:
                        raise WrongBytes(f"extents end at {end}")
                self.settle(image, "extents", answer.status, answer.fields)
        finally:
            image.model.end_read(read)


class Prober(Client):
    """What a load balancer does; never refused, never late."""

    def __init__(self, *args: object, images: list[Image]) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._images = images
        self.seconds: list[float] = []

    def act(self) -> None:
        """Probe once."""
        image = self.choose.choice(self._images)
        self._ended.wait(0.02)
        began = time.monotonic()
        with self.exchange(image, "OPTIONS") as wire:
            wire.ask("OPTIONS", f"/images/{image.name}")
            answer = wire.answer()
            self.seconds.append(time.monotonic() - began)
            if answer.status != 200:  # noqa: PLR2004
                self.fail(f"OPTIONS {image.name}: {answer.status}")
            self.settle(image, "OPTIONS", answer.status, answer.fields)
