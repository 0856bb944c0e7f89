# SPDX-License-Identifier: Apache-2.0
"""Whether a request's client is still there, looked at while a back end is waited for.

What poll(2) says of its socket, and what that means:

    POLLERR, POLLHUP     gone: it has reset the connection, or shut it down both ways
    POLLRDHUP, while     it sends no more; whoever reads the body finds that out
      the body is read
    POLLRDHUP over TLS   gone: who says no more over TLS says so there, and leaves TCP open
    POLLRDHUP otherwise  gone, or half-closed to read the answer: HTTP allows that, and TCP does
                         not tell. It is asked: a host answers what comes for a socket that is
                         closed with a reset.

To ask is to send ``100 Continue``. Every client of HTTP/1.1 skips it in front of the answer,
expected or not (RFC 9110 section 15.2). It goes out before the answer's head only, into an
empty buffer. A client whose host has died says nothing at all: keep-alive probes (tcp(7)) tell.
"""

import contextlib
import select
import socket
import threading
import time

from imageserver.server.wire import RequestInput, send_queue

#: How often a client that has half-closed is asked, in seconds.
_ASK_SECONDS = 5.0
_QUESTION = b"HTTP/1.1 100 Continue\r\n\r\n"
#: A host that says nothing is taken for dead after 30 + 3 * 10 s.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class Presence:
    """One request's client. ``is_gone`` may be called from any thread."""

    def __init__(
        self, sock: socket.socket, body: RequestInput, *, is_tls: bool, knows_100: bool
    ) -> None:
        """``knows_100``: it speaks HTTP/1.1."""
        self._sock = sock
        self._body = body
        self._is_tls = is_tls
        self._lock = threading.Lock()
        self._may_ask = knows_100 and not is_tls
        self._ask_at = 0.0
        self._is_new = True

    def is_gone(self) -> bool:
        """Tell whether nobody waits for the answer any more, as far as that can be known."""
        if self._is_new:
            self._is_new = False
            self._keep_alive()
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        events = sum(event for _, event in poller.poll(0))
        if events & (select.POLLERR | select.POLLHUP):
            return True
        if not events & select.POLLRDHUP or self._body.left:
            return False
        return self._is_tls or self._is_refused()

    def answering(self) -> None:
        """Say that the answer's head goes out now: nothing else may be sent any more."""
        with self._lock:
            self._may_ask = False

    def _keep_alive(self) -> None:
        if self._sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                for level, option, value in _KEEPALIVE:
                    self._sock.setsockopt(level, option, value)

    def _is_refused(self) -> bool:
        """Ask now and then; True where that fails. A reset shows in the next look."""
        with self._lock:
            now = time.monotonic()
            if self._may_ask and now >= self._ask_at:
                self._ask_at = now + _ASK_SECONDS
                try:
                    if send_queue(self._sock) == bytes(4):  # so that it goes as a whole
                        self._sock.send(_QUESTION)
                except OSError:
                    return True
        return False
