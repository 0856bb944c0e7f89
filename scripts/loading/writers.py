# SPDX-License-Identifier: Apache-2.0
"""Who restores images. Each image has one such user, so that its model stays a line."""

import gevent
from lab.model import Model, pattern
from locust import task
from locust.exception import StopUser

from loading.client import Answer, Call
from loading.images import pieces
from loading.ledger import Kind
from loading.users import PIECE, LoadUser

_PARTS_OF_A_RESTORE = 4
_JSON = {"Content-Type": "application/json"}
#: How many restores write the whole image, where they could write parts.
_REPLACED = 0.3
#: The server says a second; who does not obey meets more of its limits.
_PAUSE_SECONDS = (0.01, 0.1)


class RestoreWriter(LoadUser):
    """The only writer of one image: writes it, whole or in parts, and reads it back."""

    kind = "restore"
    is_ready = False

    def on_start(self) -> None:
        """Take an image, and write all of it: from now on what it contains is known."""
        super().on_start()
        if not self.plan.unclaimed:
            raise StopUser
        self.image = self.plan.unclaimed.pop()
        self.image.model = Model(self.image.size, is_whole=not self.image.is_nbd)
        for start, stop in self._all():
            if not self._insist(start, pattern(self.choose, stop - start)):
                raise StopUser
        self.plan.unready.remove(self.image)
        self.is_ready = True

    def on_stop(self) -> None:
        """Read all of it back, for the last time."""
        if self.is_ready:
            for span in self._all():
                self._read_back(span)
        super().on_stop()

    @task
    def restore(self) -> None:
        """Write all, or some parts and zeros, flush, read back."""
        if not self.image.is_nbd or (self.image.is_whole and self.choose.random() < _REPLACED):
            if self._insist(0, pattern(self.choose, self.image.size)):
                self._read_back((0, self.image.size))
            return
        for _ in range(self.choose.randint(1, _PARTS_OF_A_RESTORE)):
            start, stop = self.span_in(self.image)
            zero = self.choose.random() < 0.5  # noqa: PLR2004
            data = bytes(stop - start) if zero else pattern(self.choose, stop - start)
            if self._insist(start, data, zero=zero):
                self._read_back((start, stop))
        self._flush()

    def _all(self) -> list[tuple[int, int]]:
        everything = [(0, self.image.size)]
        return everything if self.image.is_whole else pieces(everything, PIECE)

    def _insist(self, start: int, data: bytes, *, zero: bool = False) -> bool:
        """Write until it is not refused any more; tell whether it was done."""
        while True:
            answer = self._write(start, data, zero=zero)
            if answer is None or not answer.refused:
                return answer is not None
            gevent.sleep(self.choose.uniform(*_PAUSE_SECONDS))

    def _write(self, start: int, data: bytes, *, zero: bool) -> Answer | None:
        model = self.image.model
        assert model is not None  # noqa: S101 - since on_start
        with model.writing(start, data) as write:
            answer = self.client.ask(self._call(start, data, zero=zero))
            if answer:
                write.done = None if answer.refused else True
            return answer

    def _call(self, start: int, data: bytes, *, zero: bool) -> Call:
        path, lockable = self.image.path, self.image.lockable
        if zero:
            body = f'{{"op":"zero","offset":{start},"size":{len(data)}}}'.encode()
            return Call("PATCH zero", "PATCH", path, (200,), Kind.ZERO, lockable, _JSON, body)
        if self.image.is_whole and len(data) == self.image.size:
            return Call("PUT", "PUT", path, (200,), Kind.REPLACE, lockable, {}, data)
        headers = {"Range": f"bytes={start}-{start + len(data) - 1}"}
        return Call("PATCH range", "PATCH", path, (200,), Kind.WRITE, lockable, headers, data)

    def _read_back(self, span: tuple[int, int]) -> None:
        for _ in range(100):
            answer = self.read("GET back", self.image, span)
            if answer is None or not answer.refused:
                return
            gevent.sleep(self.choose.uniform(*_PAUSE_SECONDS))

    def _flush(self) -> None:
        path = self.image.path
        call = Call("POST flush", "POST", f"{path}/flush", (200,), Kind.FLUSH, self.image.lockable)
        self.client.ask(call)
