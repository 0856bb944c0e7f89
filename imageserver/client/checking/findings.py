# SPDX-License-Identifier: Apache-2.0
"""A check of ``imagectl check``: what it is given, how it ends, what all of them found.

A check is a function that returns what it has seen, or raises what it found instead:

    Differs   it works, but otherwise than docs/api.md says; oVirt's daemon does in places
    Missing   the server does not offer it
    Wrong     the server announced it, or HTTP demands it, and it does not work

``read_checks`` and ``extent_checks`` have those that only read, ``write_checks`` the others.
"""

import contextlib
import functools
import re
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from imageserver.client.backoff import retried_start, retried_while_busy
from imageserver.client.checking.probe import Connection, Reply, Request
from imageserver.client.failures import Busy, ClientError, Unreachable
from imageserver.client.http.access import Access
from imageserver.client.http.remote import Remote
from imageserver.core.checksums import DEFAULT_BLOCK_SIZE
from imageserver.core.extents import Extent

#: Bytes read where some are enough.
SAMPLE = 64 * 1024
_OK, _PARTIAL = 200, 206
_BUSY = {409, 503}


class Verdict(Enum):
    """How a check ended."""

    OK = "ok"
    DIFFERS = "differs"
    MISSING = "missing"
    FAILED = "failed"


class Differs(Exception):
    """It works, but otherwise than docs/api.md says."""


class Missing(Exception):
    """The server does not offer it."""


class Wrong(Exception):
    """It was announced, or HTTP demands it, and it does not work."""


_VERDICTS = {Differs: Verdict.DIFFERS, Missing: Verdict.MISSING, Wrong: Verdict.FAILED}


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one check."""

    check: str
    verdict: Verdict
    detail: str


class Subject:
    """The image that is checked, with the abilities and the size that its server told."""

    def __init__(self, access: Access, seconds: float) -> None:
        """``seconds``: how long a busy server is asked again."""
        self.access = access
        self._seconds = seconds
        with contextlib.closing(Remote(access, 1)) as remote:
            self.abilities = retried_while_busy(remote.abilities, seconds)
        self.size = self.remote_size()

    def connection(self, *, to_unknown_id: bool = False) -> Connection:
        """Return a connection, to be entered; its requests may name an id that nobody knows."""
        connection = Connection(self.access)
        if to_unknown_id:
            connection.target = re.sub("[^/]+$", str(uuid.uuid4()), connection.target)
        return connection

    def ask(self, request: Request) -> Reply:
        """Make one request on a connection of its own."""
        return self.ask_by(lambda connection: connection.ask(request))

    def ask_by(self, ask: Callable[[Connection], Reply]) -> Reply:
        """Ask on a connection of its own; again while the server is busy.

        It may be so with what was left half-read, until it notices that.
        """

        def once() -> Reply:
            with self.connection() as connection:
                reply = ask(connection)
            if reply.status in _BUSY:
                raise Busy(f"the server is busy: {reply.error}", 0.2)
            return reply

        return retried_while_busy(once, self._seconds)

    def needs(self, feature: str) -> None:
        """Require a feature.

        Raises:
            Missing: the server does not announce it.
        """
        if not self.abilities.has(feature):
            raise Missing("not announced")

    def needs_bytes(self) -> None:
        """Require an image that is not empty.

        Raises:
            Missing: it is empty.
        """
        if not self.size:
            raise Missing("the image is empty")

    def remote_size(self) -> int:
        """Ask how large the image is now."""
        with contextlib.closing(Remote(self.access, 1)) as remote:
            return retried_while_busy(remote.size, self._seconds)

    def range(self, text: str) -> Reply:
        """Ask for a range."""
        return self.ask(Request("GET", headers={"Range": f"bytes={text}"}))

    def bytes_at(self, start: int, stop: int) -> bytes:
        """Read a span.

        Raises:
            Wrong: it cannot be read.
        """
        reply = self.range(f"{start}-{stop - 1}")
        return partial(reply, start, stop, self.size)

    def checksum(self, length: int) -> str | None:
        """Return the SHA-256 block hash of the first bytes; None: there is none of spans."""
        with contextlib.closing(Remote(self.access, 1)) as remote:
            retried_while_busy(remote.abilities, self._seconds)  # tell who answers
            if not retried_while_busy(lambda: remote.has_spans(self.size), self._seconds):
                return None
            ask = functools.partial(remote.checksum, "sha256", DEFAULT_BLOCK_SIZE, (0, length))
            return retried_while_busy(ask, self._seconds)

    def extents(self, context: str) -> Generator[Extent]:
        """Yield the extents; ``Failed`` where they have a gap."""
        with contextlib.closing(Remote(self.access, 1)) as remote:
            yield from retried_start(lambda: remote.extents(context), self._seconds)


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


def require_done(reply: Reply) -> None:
    """Require an answer to say that what was asked for is done.

    Raises:
        Wrong: it does not.
    """
    if reply.status != _OK:
        raise Wrong(f"status {reply.status}: {reply.error}")
    if reply.body and not reply.says_done:
        raise Wrong(f"status {reply.status}, without saying that it is done")


@dataclass(frozen=True, slots=True)
class Check:
    """The name of a promise, and the function that tries it."""

    name: str
    run: Callable[[Subject], str]


def findings(subject: Subject, checks: Sequence[Check]) -> Iterator[Finding]:
    """Run one check after the other.

    Raises:
        Transient: the server is busy or gone.
    """
    for check in checks:
        try:
            yield Finding(check.name, Verdict.OK, check.run(subject))
        except (Differs, Missing, Wrong) as exc:
            yield Finding(check.name, _VERDICTS[type(exc)], str(exc))
        except (Busy, Unreachable):
            raise  # which says nothing about the promise
        except ClientError as exc:
            yield Finding(check.name, Verdict.FAILED, str(exc))
