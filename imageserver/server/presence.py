# SPDX-License-Identifier: Apache-2.0
"""Whether a request's client is still connected; checked while a thread waits for a back end.

What poll(2) says of its socket, and what that means:

    POLLERR, POLLHUP     gone: it has reset the connection, or shut it down both ways
    POLLRDHUP over TLS   gone: a client that half-closes does so in TLS (close_notify), not in TCP
    POLLRDHUP otherwise  gone, or half-closed to read the answer: HTTP allows that, and TCP does
                         not distinguish them. So something is sent: a host answers data for a
                         closed socket with a reset.

What is sent is ``100 Continue``. Every client of HTTP/1.1 skips it in front of the answer,
expected or not (RFC 9110 section 15.2). It is sent only before the answer's head, and only when
the send queue is empty. For a client whose host has died, TCP keep-alive probes (tcp(7)) fail.

Bytes of a body that nobody has read change nothing of this, and are left where they are. Only
where the receive buffer is full of them does the end of the connection stay unseen.
"""

import contextlib
import select
import socket
import threading
import time

from imageserver.server.wire import send_queue

#: How often 100 is sent to a client that may have half-closed, in seconds.
_ASK_SECONDS = 5.0
_QUESTION = b"HTTP/1.1 100 Continue\r\n\r\n"
#: A host that answers nothing counts as dead after 30 + 3 * 10 s.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)


class Presence:
    """One request's client. ``is_gone`` may be called from any thread."""

    def __init__(self, sock: socket.socket, *, is_tls: bool, knows_100: bool) -> None:
        """``knows_100``: it speaks HTTP/1.1."""
        self._sock = sock
        self._is_tls = is_tls
        self._lock = threading.Lock()
        self._may_ask = knows_100 and not is_tls
        self._ask_at = 0.0
        self._is_new = True

    def is_gone(self) -> bool:
        """Tell whether the client has gone, as far as that can be known."""
        if self._is_new:
            self._is_new = False
            self._keep_alive()
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        events = sum(event for _, event in poller.poll(0))
        if events & (select.POLLERR | select.POLLHUP):
            return True
        if not events & select.POLLRDHUP:
            return False
        return self._is_tls or self._is_refused()

    def answering(self) -> None:
        """Note that the answer's head is sent now: no 100 may follow."""
        with self._lock:
            self._may_ask = False

    def _keep_alive(self) -> None:
        if self._sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                for level, option, value in _KEEPALIVE:
                    self._sock.setsockopt(level, option, value)

    def _is_refused(self) -> bool:
        """Send 100 if it is time to; True where that fails. A reset shows in the next poll."""
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
