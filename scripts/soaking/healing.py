# SPDX-License-Identifier: Apache-2.0
"""Liveness, once the storm is over: whatever may be asked for is to be had within a bound.

In the storm, only what is wrong counts: requests may be refused, fail with their NBD server, or be
cut with their worker, and a server that refused all of them would be safe. Then nothing is killed
any more, and nobody else asks for anything: each image must be readable and writable, and each
limit reachable to its last slot, but no further.
"""

import contextlib
import json
import random
import time
from collections.abc import Callable
from functools import partial

from lab.model import check_extents, pattern
from lab.wire import Answer, Cut, Hanging, Wire

from soaking.backends import SIZE, Image
from soaking.chaos import Trace

#: Longer than the server's timeouts in the storm, and than a worker takes to be replaced.
HEALED_SECONDS = 20.0
#: For any one step of a request.
_STEP_SECONDS = 10.0
_CONTINUE, _OK, _REFUSED = 100, 200, 503
#: Bytes of what fills a write slot: as an image that nobody else has.
_SPARE = 4096
_JSON = {"Content-Type": "application/json"}


class NotHealed(Exception):
    """Something cannot be had though nothing is wrong any more; ``str()`` says what."""


class Healing:
    """Looks at a server whose clients have gone, and whose NBD servers are all back."""

    def __init__(self, port: int, images: list[Image], spare: list[str], seed: str) -> None:
        """``spare`` names images of nobody's, one more than the server's ``MAX_WRITERS``."""
        self._port = port
        self._images = images
        self._spare = spare
        self._choose = random.Random(seed)
        self._deadline = time.monotonic() + HEALED_SECONDS

    def check(self, trace: Trace, readers: int) -> None:
        """Make the soak fail where not everything can be had; ``readers``: the server's limit."""
        try:
            for image in self._images:
                self._use(image)
            self._fill_reads(readers)
            self._fill_writes()
        except NotHealed as exc:
            trace.fail(f"not healed: {exc}")
        else:
            trace.counts["healed"] += 1

    def _insist(self, what: str, ask: Callable[[], Answer | str]) -> None:
        """Try until it works; "" and 200 are success, other texts and answers what went wrong."""
        while True:
            try:
                got = ask()
            except (Cut, Hanging) as exc:
                got = f"{type(exc).__name__} {exc}"
            if isinstance(got, Answer):
                got = "" if got.status == _OK else f"{got.status} {got.body[:80]!r}"
            if not got:
                return
            if time.monotonic() > self._deadline:
                raise NotHealed(f"{what}: {got} after {HEALED_SECONDS:g} s")
            time.sleep(0.05)

    def _ask(
        self, method: str, path: str, body: bytes = b"", fields: dict[str, str] | None = None
    ) -> Answer:
        with Wire(self._port, _STEP_SECONDS) as wire:
            wire.ask(method, f"/images/{path}", fields or {}, body)
            return wire.answer()

    def _use(self, image: Image) -> None:
        """Write the image, read it, and do whatever else can be done with it."""
        self._insist(f"PUT {image.name}", lambda: self._write(image, 0, SIZE))
        self._insist(f"GET {image.name}", lambda: self._read(image))
        self._insist(f"flush {image.name}", lambda: self._ask("POST", f"{image.name}/flush"))
        if image.is_nbd:
            start = self._choose.randrange(SIZE - 65536)
            self._insist(f"PATCH {image.name}", lambda: self._write(image, start, 65536))
            self._insist(f"zero {image.name}", lambda: self._zero(image, start))
            self._insist(f"extents {image.name}", lambda: self._map(image))
            self._insist(f"GET {image.name}", lambda: self._read(image))

    def _write(self, image: Image, start: int, size: int) -> Answer:
        data = pattern(self._choose, size)
        fields = {"Range": f"bytes={start}-{start + size - 1}"} if size < SIZE else {}
        with image.model.writing(start, data) as write:
            answer = self._ask("PATCH" if fields else "PUT", image.name, data, fields)
            write.done = True if answer.status == _OK else None
        return answer

    def _zero(self, image: Image, start: int) -> Answer:
        body = json.dumps({"op": "zero", "offset": start, "size": 65536, "flush": True}).encode()
        with image.model.writing(start, bytes(65536)) as write:
            answer = self._ask("PATCH", image.name, body, _JSON)
            write.done = True if answer.status == _OK else None
        return answer

    def _read(self, image: Image) -> Answer | str:
        with image.model.reading(0, SIZE) as read:
            answer = self._ask("GET", image.name)
            if answer.status == _OK:
                image.model.check(read, answer.body)
                return "" if len(answer.body) == SIZE else f"{len(answer.body)} bytes"
        return answer

    def _map(self, image: Image) -> Answer:
        with image.model.reading(0, SIZE) as read:
            answer = self._ask("GET", f"{image.name}/extents")
            if answer.status == _OK:
                check_extents(answer.json, image.model, read, dirty=False)
        return answer

    def _fill_reads(self, readers: int) -> None:
        """Have as many reads under way as there may be, and one more refused."""
        names = [self._images[n % len(self._images)].name for n in range(readers)]
        with contextlib.ExitStack() as held:
            for number, name in enumerate(names, 1):
                what = f"read {number} of {readers}"
                self._insist(what, partial(self._hold, held, "GET", name))
            refused = self._ask("GET", self._images[0].name).status
            if refused != _REFUSED:
                raise NotHealed(f"read {readers + 1} of {readers}: {refused}")
        self._insist("GET after all reads", lambda: self._ask("GET", self._images[0].name))

    def _fill_writes(self) -> None:
        """Have as many writes under way as there may be, one more refused, and end them all."""
        *names, one_more = self._spare
        wires: list[Wire] = []
        with contextlib.ExitStack() as held:
            for number, name in enumerate(names, 1):
                what = f"write {number} of {len(names)}"
                self._insist(what, partial(self._hold, held, "PUT", name, wires))
            refused = self._ask("PUT", one_more, bytes(_SPARE)).status
            if refused != _REFUSED:
                raise NotHealed(f"write {len(names) + 1} of {len(names)}: {refused}")
            for wire in wires:
                wire.send(bytes(_SPARE))
            if {wire.answer().status for wire in wires} != {_OK}:
                raise NotHealed("a write that had its slot failed")
        self._insist("PUT after all writes", lambda: self._ask("PUT", one_more, bytes(_SPARE)))

    def _hold(
        self, held: contextlib.ExitStack, method: str, name: str, wires: list[Wire] | None = None
    ) -> str:
        """Begin a request and keep it under way; "" where it was let in."""
        upload = {"Content-Length": str(_SPARE), "Expect": "100-continue"}
        with contextlib.ExitStack() as opened:
            wire = opened.enter_context(Wire(self._port, _STEP_SECONDS))
            wire.ask(method, f"/images/{name}", upload if method == "PUT" else {})
            head = wire.head()
            if head.status != (_CONTINUE if method == "PUT" else _OK):
                return f"{head.status}"
            held.push(opened.pop_all())
            if wires is not None:
                wires.append(wire)
        return ""
