# SPDX-License-Identifier: Apache-2.0
"""The frame of ``imagectl check``: what is checked, and what may come of it.

A check is a function that returns what it has seen, or raises what it found instead:

    Differs   it works, but otherwise than docs/api.md says; oVirt's daemon does in places
    Missing   the server does not offer it
    Wrong     it was announced, or HTTP demands it, and it does not hold

``checks_read`` has those that change nothing on the server, ``checks_write`` the others.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice
from typing import TypeVar

from imageserver.client.checking.asking import answered
from imageserver.client.checking.probe import Line, Reply, Request
from imageserver.client.failures import Busy, ClientError, Unreachable
from imageserver.client.http.access import Access
from imageserver.client.http.remote import Abilities, Remote
from imageserver.core.extents import Extent

#: Bytes read where some are enough.
SAMPLE = 64 * 1024
_PARTIAL = 206
_BUSY = {409, 503}

T = TypeVar("T")


class Verdict(Enum):
    """How a check ended."""

    OK = "ok"
    DIFFERS = "differs"
    MISSING = "missing"
    FAILED = "failed"


class Differs(Exception):
    """It works otherwise than docs/api.md says."""


class Missing(Exception):
    """It is not offered."""


class Wrong(Exception):
    """It does not hold."""


_VERDICTS = {Differs: Verdict.DIFFERS, Missing: Verdict.MISSING, Wrong: Verdict.FAILED}


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one check."""

    check: str
    verdict: Verdict
    detail: str


class Subject:
    """The image that is checked, and what is known of it so far."""

    def __init__(self, access: Access, patience: float) -> None:
        """``patience``: seconds for which a busy server is asked again."""
        self.access = access
        self._patience = patience
        with contextlib.closing(Remote(access, 1)) as remote:
            self.abilities: Abilities = self._patiently(remote.abilities)
        self.size = self.remote_size()

    def line(self) -> Line:
        """Return a connection, to be entered."""
        return Line(self.access)

    def ask(self, request: Request) -> Reply:
        """Make one request on a connection of its own."""

        def once() -> Reply:
            with self.line() as line:
                reply = line.ask(request)
            if reply.status in _BUSY:
                raise Busy(f"the server is busy: {reply.error}", 0.2)
            return reply

        return self._patiently(once)

    def _patiently(self, action: Callable[[], T]) -> T:
        return answered(action, self._patience)

    def remote_size(self) -> int:
        """Ask how large the image is now."""
        with contextlib.closing(Remote(self.access, 1)) as remote:
            return self._patiently(remote.size)

    def range(self, text: str) -> Reply:
        """Ask for a range."""
        return self.ask(Request("GET", headers={"Range": f"bytes={text}"}))

    def bytes_at(self, start: int, stop: int) -> bytes:
        """Read a span.

        Raises:
            Wrong: it cannot be had.
        """
        reply = self.range(f"{start}-{stop - 1}")
        return partial(reply, start, stop, self.size)

    def extents(self, context: str) -> Generator[Extent]:
        """Yield the extents; whether they have gaps is looked at on the way."""
        with contextlib.closing(Remote(self.access, 1)) as remote:

            def begin() -> Iterator[Extent]:
                extents = remote.extents(context)
                return chain(list(islice(extents, 1)), extents)  # asks now

            yield from self._patiently(begin)


def partial(reply: Reply, start: int, stop: int, size: int) -> bytes:
    """Return the bytes of an answer that must be this range.

    Raises:
        Wrong: it is another, or none.
    """
    if reply.status != _PARTIAL:
        raise Wrong(f"bytes {start} to {stop}: status {reply.status}")
    wanted = f"bytes {start}-{stop - 1}/"
    found = reply.headers.get("Content-Range", "")
    if found not in {f"{wanted}{size}", f"{wanted}*"}:
        raise Wrong(f"Content-Range is {found!r} where it must be {wanted}{size}")
    if reply.body is None or len(reply.body) != stop - start:
        raise Wrong(f"bytes {start} to {stop}: another number of bytes came")
    return reply.body


@dataclass(frozen=True, slots=True)
class Check:
    """A promise by name, and what tries it."""

    name: str
    run: Callable[[Subject], str]


def findings(subject: Subject, checks: Sequence[Check]) -> Iterator[Finding]:
    """Try one after the other.

    Raises:
        Transient: the server is busy or gone.
    """
    for check in checks:
        try:
            yield Finding(check.name, Verdict.OK, check.run(subject))
        except (Differs, Missing, Wrong) as exc:
            yield Finding(check.name, _VERDICTS[type(exc)], str(exc))
        except (Busy, Unreachable):
            raise  # that says nothing of what it promises
        except ClientError as exc:
            yield Finding(check.name, Verdict.FAILED, str(exc))
