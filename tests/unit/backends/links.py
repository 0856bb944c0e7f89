# SPDX-License-Identifier: Apache-2.0
"""A connection to an NBD server that is not there: ``backends.nbd.link.Link`` over bytes.

Requests are carried out only when they are waited for, the latest first: whoever uses a buffer
before its request is complete, or again too early, gets wrong bytes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from imageserver.backends.nbd.failures import Stopped
from imageserver.backends.nbd.link import Link
from imageserver.core.extents import Reply

KIB = 1024


@dataclass
class Request:
    """One command, as it was sent."""

    command: str
    start: int
    length: int
    carry_out: Callable[[], object] = lambda: None

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass
class FakeLink:
    """What ``Link`` has, over ``content``; ``fail`` is raised by who waits for such a request."""

    content: bytearray
    align: int = 1
    chunk: int = 4 * KIB
    depth: int = 3
    maximum: int = 32 << 20
    can_zero: bool = True
    fast_zero: bool = False
    contexts: tuple[str, ...] = ()
    status: Callable[[int, int], dict[str, Reply]] = lambda _start, _length: {}
    fail: Callable[[Request], BaseException | None] = lambda _: None
    #: Called by who waits for a request, before it is complete.
    on_wait: Callable[[Request], object] = lambda _: None
    #: Waiting for such a request takes until the link is stopped.
    hangs: Callable[[Request], bool] = lambda _: False
    is_alone: bool = True
    size: int = -1
    name: str = "export"
    server: tuple[int, ...] = (1, 2, 3)
    settled: bool = True
    settles: int = 0
    most_in_flight: int = 0
    requests: list[Request] = field(default_factory=list)
    in_flight: dict[int, Request] = field(default_factory=dict)
    stop_asked: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.size < 0:
            self.size = len(self.content)

    @property
    def link(self) -> Link:
        return cast("Link", self)

    @property
    def info(self) -> Any:
        return SimpleNamespace(can_zero=self.can_zero)

    def can_fast_zero(self) -> bool:
        return self.fast_zero

    def has_context(self, name: str) -> bool:
        return name in self.contexts

    def sent(self, command: str) -> list[tuple[int, int]]:
        """Return offset and length of all such requests."""
        return [(r.start, r.length) for r in self.requests if r.command == command]

    def pread(self, view: memoryview, offset: int) -> int:
        def carry_out() -> None:
            view[:] = self.content[offset : offset + len(view)]

        return self._submit(Request("read", offset, len(view), carry_out))

    def pwrite(self, view: memoryview, offset: int) -> int:
        def carry_out() -> None:
            self.content[offset : offset + len(view)] = view

        self.settled = False
        return self._submit(Request("write", offset, len(view), carry_out))

    def zero(self, offset: int, length: int, *, fast: bool, hole: bool = True) -> int:
        def carry_out() -> None:
            if self.content:
                self.content[offset : offset + length] = bytes(length)

        self.settled = False
        command = ("fast " if fast else "") + "zero" + ("" if hole else " without holes")
        return self._submit(Request(command, offset, length, carry_out))

    def block_status(self, offset: int, length: int, replies: dict[str, Reply]) -> int:
        def carry_out() -> None:
            replies.update(self.status(offset, length))

        return self._submit(Request("status", offset, length, carry_out))

    def _submit(self, request: Request) -> int:
        assert request.start % self.align == 0
        assert request.stop % self.align == 0 or request.stop == self.size
        assert request.length > 0
        assert request.stop <= self.size
        self.requests.append(request)
        cookie = len(self.requests) - 1
        self.in_flight[cookie] = request
        self.most_in_flight = max(self.most_in_flight, len(self.in_flight))
        return cookie

    def wait(self, cookie: int) -> None:
        request = self.requests[cookie]
        if self.hangs(request):
            assert self.stop_asked.wait(10)
            raise Stopped(self.name)
        self.on_wait(request)
        error = self.fail(request)
        if error:
            del self.in_flight[cookie]
            raise error
        for earlier in sorted(self.in_flight, reverse=True):
            if earlier <= cookie and not self.fail(self.in_flight[earlier]):
                self.in_flight.pop(earlier).carry_out()

    def settle(self) -> None:
        self.settles += not self.settled
        self.settled = True

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop_asked.set()
        yield


def at(command: str, start: int) -> Callable[[Request], bool]:
    """Tell which request is of that kind and begins there, or covers it."""
    return lambda request: request.command == command and request.start <= start < request.stop
