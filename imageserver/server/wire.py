# SPDX-License-Identifier: Apache-2.0
"""Bytes to and from a client's socket, within the client timeout.

Each wait is for *some* byte to move: ``sendall`` would put one limit on the whole piece,
which a slow but living client must not meet.
"""

import json
import select
import socket
from collections.abc import Callable

from imageserver.errors import ClientGone

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


def wait(sock: socket.socket, events: int, seconds: float) -> bool:
    """Wait until a socket is ready for ``events`` (poll(2)), or broken; False after ``seconds``."""
    poller = select.poll()
    poller.register(sock, events)
    return bool(poller.poll(seconds * 1000))


class Wire:
    """A client's socket, which never blocks, with a limit on how long nothing may move."""

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self.sock = sock
        self._timeout = timeout

    def send(self, *pieces: bytes | memoryview) -> None:
        """Send every byte of all pieces, together where they fit.

        Raises:
            ClientGone: the connection broke, or took no byte for the timeout.
        """
        views = [memoryview(piece) for piece in pieces if len(piece)]
        while views:
            sent = self._retry(lambda: self.sock.sendmsg(views), select.POLLOUT)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]

    def recv_into(self, buffer: memoryview) -> int:
        """Fill ``buffer`` with what has arrived; 0 where the client has closed.

        Raises:
            ClientGone: the connection broke, or brought no byte for the timeout.
        """
        return self._retry(lambda: self.sock.recv_into(buffer), select.POLLIN)

    def _retry(self, action: Callable[[], int], events: int) -> int:
        while True:
            try:
                return action()
            except BlockingIOError:
                if not wait(self.sock, events, self._timeout):
                    raise ClientGone from None
            except OSError as exc:
                raise ClientGone from exc


def refusal(status: int, message: str, *, retry: bool = False) -> bytes:
    """Return a whole answer for a request that the application does not get to see."""
    body = json.dumps({"error": message}, separators=(",", ":"))
    return (
        f"HTTP/1.1 {status} {REASONS[status]}\r\n"
        "Connection: close\r\n"
        "Accept-Ranges: bytes\r\n"
        "Access-Control-Allow-Methods: GET, PUT, OPTIONS\r\n"
        + ("Retry-After: 1\r\n" if retry else "")
        + "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode("ascii")


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

    def readinto(self, buffer: memoryview) -> int:
        """Fill ``buffer`` with what has arrived; 0 at the body's end.

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
            count = self._wire.recv_into(buffer[:wanted])
        self.left -= count
        return count

    def read(self, size: int = -1) -> bytes:
        """Return up to ``size`` bytes, fewer only at the body's end (PEP 3333)."""
        wanted = self.left if size < 0 else min(size, self.left)
        body = memoryview(bytearray(wanted))
        filled = 0
        while filled < wanted:
            count = self.readinto(body[filled:])
            if count == 0:
                break
            filled += count
        return bytes(body[:filled])

    def discard_early(self) -> None:
        """Drop what of the body has come with the head, where nobody has read it."""
        count = min(self.left, len(self._early))
        del self._early[:count]
        self.left -= count
