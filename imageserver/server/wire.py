# SPDX-License-Identifier: Apache-2.0
"""Bytes to and from a client's socket, within the client timeout.

Each wait is for *some* byte to move: ``sendall`` would put one limit on the whole piece,
which a slow but living client must not meet.
"""

import fcntl
import json
import logging
import select
import socket
import ssl
import sys
import termios
import time
from collections.abc import Callable
from functools import partial

from imageserver.core.entry import fields
from imageserver.core.errors import ClientGone
from imageserver.core.sources import HasFileno

log = logging.getLogger(__name__)

#: Standard reasons for what is answered before the application sees a request.
REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    414: "URI Too Long",
    417: "Expectation Failed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}

#: What a socket that never blocks raises where another would wait. TLS says what it waits for,
#: which need not be what it was asked to do.
BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

#: How often, within the client timeout, one who waits looks whether bytes have moved.
LOOKS = 8


def wait(sock: HasFileno, events: int, seconds: float, until: HasFileno | None = None) -> bool:
    """Wait until a socket is ready for ``events`` (poll(2)), or broken; False after ``seconds``.

    Return early, with True, where ``until`` becomes readable.
    """
    poller = select.poll()
    poller.register(sock, events)
    if until:
        poller.register(until, select.POLLIN)
    return bool(poller.poll(max(0.0, seconds) * 1000))


def awaited(blocked: OSError, usual: int) -> int:
    """Return the events (poll(2)) that a blocked action waits for; ``usual`` without TLS."""
    if isinstance(blocked, ssl.SSLWantReadError):
        return select.POLLIN
    return select.POLLOUT if isinstance(blocked, ssl.SSLWantWriteError) else usual


class Wire:
    """A client's non-blocking socket, with a limit on the time in which no byte moves."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        self.timeout = timeout

    def send(self, *pieces: bytes | memoryview) -> None:
        """Send every byte of all pieces, together where they fit.

        Raises:
            ClientGone: the connection broke, or took no byte for the timeout.
        """
        views = [piece for piece in pieces if len(piece)]
        while views:
            sent = self._retry(partial(self.sock.sendmsg, views), select.POLLOUT)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = memoryview(views[0])[sent:]

    def recv_into(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        """Fill ``buffer`` with what has arrived; 0 where the client has closed.

        Also 0 where ``until`` becomes readable first.

        Raises:
            ClientGone: the connection broke, or brought no byte for the timeout.
        """
        return self._retry(lambda: self.sock.recv_into(buffer), select.POLLIN, until)

    def _retry(self, action: Callable[[], int], events: int, until: HasFileno | None = None) -> int:
        inactivity: _Inactivity | None = None
        while True:
            try:
                return action()
            except BLOCKED as exc:
                # A socket that is readable need not have brought a byte of the body: a TLS
                # record may carry none. A writable one has sent some of the answer.
                if inactivity is None or events == select.POLLOUT:
                    inactivity = _Inactivity(self.sock)
                if not self._wait(awaited(exc, events), until, inactivity):
                    return 0
            except OSError as exc:
                raise ClientGone from exc

    def _wait(self, events: int, until: HasFileno | None, inactivity: "_Inactivity") -> bool:
        """Wait until ``events``, or ``until`` (False)."""
        while inactivity.seconds() < self.timeout:
            if wait(self.sock, events, self.timeout / LOOKS, until):
                return until is None or not wait(until, select.POLLIN, 0)
        raise ClientGone from None


class _Inactivity:
    """How long a client has sent and taken nothing.

    poll(2) is not enough: a socket becomes writable only when a third of its buffer, which may
    be megabytes, is free. A slow client would be cut off while it takes what it can.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._began = time.monotonic()
        self._least = _count(send_queue(sock))

    def seconds(self) -> float:
        """Return the seconds since the send queue was last shorter than ever before.

        Only then has the client taken a byte: TLS answers some records by itself, so a queue
        that grows and shrinks again means nothing.
        """
        now, count = time.monotonic(), _count(send_queue(self._sock))
        if count < self._least:
            self._began, self._least = now, count
        return now - self._began


def _count(number: bytes) -> int:
    return int.from_bytes(number, sys.byteorder)


def send_queue(sock: socket.socket) -> bytes:
    """Return how many bytes are unsent or unacknowledged, as an int of C (SIOCOUTQ, tcp(7))."""
    return fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))


def refusal(status: int, message: str, head: bytes | bytearray, *, retry: bool = False) -> bytes:
    """Return a whole answer for a request that the application does not get to see.

    ``head``: the request's, as far as it has come. An answer to HEAD has no body (RFC 9110
    section 9.3.2), else the client would take it for the next answer.
    """
    body = json.dumps({"error": message}, separators=(",", ":"))
    fields = (
        f"HTTP/1.1 {status} {REASONS[status]}\r\n"
        "Connection: close\r\n"
        "Accept-Ranges: bytes\r\n"
        "Access-Control-Allow-Methods: GET, PUT, OPTIONS\r\n"
        "Cache-Control: no-store\r\n"
        + ("Retry-After: 1\r\n" if retry else "")
        + "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return (fields if head.startswith(b"HEAD ") else fields + body).encode("ascii")


def refused_head(
    client: str, status: int, message: str, head: bytes | bytearray, *, retry: bool = False
) -> bytes:
    """Log that a head was refused; return the answer: see ``refusal``."""
    log.info("head refused", extra=fields(client=client, status=status, detail=message))
    return refusal(status, message, head, retry=retry)


class RequestInput:
    """A request's body, as ``wsgi.input``: what came with the head first, then the socket.

    ``100 Continue`` is sent when the application first asks for a byte, which is after every
    check that can refuse the request (RFC 9110 section 10.1.1).
    """

    def __init__(
        self, wire: Wire, early: bytearray, length: int, *, expects_continue: bool
    ) -> None:
        """``early``: what has been read of the connection already, this body first."""
        self._wire = wire
        self._early = early
        self._expects_continue = expects_continue
        self.left = length

    def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        """Fill ``buffer`` with what has arrived: see ``sources.Source``.

        Raises:
            ClientGone: the connection broke or fell silent.
        """
        wanted = min(len(buffer), self.left)
        if wanted == 0:
            return 0
        early = self._early
        if early:
            count = min(wanted, len(early))
            buffer[:count] = memoryview(early)[:count]
            del early[:count]
        else:
            if self._expects_continue:
                self._expects_continue = False
                self._wire.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            count = self._wire.recv_into(buffer[:wanted], until)
        self.left -= count
        return count

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, fewer only at the body's end (PEP 3333).

        For small bodies, which count as a part of the head: the timeout is for all of it.

        Raises:
            ClientGone: the connection broke, or this takes too long.
        """
        deadline = time.monotonic() + self._wire.timeout
        wanted = self.left if size < 0 else min(size, self.left)
        body = memoryview(bytearray(wanted))
        filled = 0
        while filled < wanted:
            count = self.readinto(body[filled:])
            if count == 0:
                break
            filled += count
            if filled < wanted and time.monotonic() > deadline:
                raise ClientGone
        return bytes(body[:filled])

    def discard_early(self) -> None:
        """Drop what of the body has come with the head, where nobody has read it."""
        count = min(self.left, len(self._early))
        del self._early[:count]
        self.left -= count
