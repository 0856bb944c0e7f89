# SPDX-License-Identifier: Apache-2.0
"""One client connection: its socket, its state, and what has been read ahead from it.

``states`` has the states, and who owns the connection in which. Nothing here waits.
"""

import contextlib
import socket
import ssl
from typing import Any

from imageserver.server.states import TRANSITIONS, Deadline, IllegalTransition, State
from imageserver.server.wire import send_queue

#: Longest head, in bytes: gunicorn's largest request line and a hundred fields of its default size
#: would be 800 KiB; clients of an image server need a few hundred bytes.
MAX_HEAD = 64 * 1024
#: A head ends with an empty line (RFC 9112 section 2.2). One made with bare LF is complete
#: too, so that the parser gets to refuse it at once.
_END = b"\r\n\r\n"
_ENDS = (b"\n\n", b"\n\r\n")
#: Heads have a few hundred bytes. What comes along of a body is copied once more, so it is little.
_AT_ONCE = 8 * 1024
#: Over TLS, all that was decrypted has to be read: no poll tells of it.
_RECORD = 64 * 1024

#: How long, and how much, a refused client may go on sending, so that it gets to read the answer
#: (docs/api.md): many HTTP clients send their whole body before they read.
LINGER_SECONDS = 10.0
LINGER_BYTES = 1 << 30

#: States in which no part of a request need have arrived.
_BEFORE_REQUEST = {State.HANDSHAKE, State.HEAD, State.IDLE}


class Connection:
    """A client's socket, what has been read ahead from it, and until when its state may last."""

    __slots__ = (
        "_scanned",
        "_state",
        "accepted_at",
        "address",
        "bad_head",
        "buffer",
        "deadline",
        "environ",
        "has_ended",
        "is_last",
        "is_tls",
        "lingered",
        "listener",
        "requests",
        "send_queue",
        "sock",
        "taken_at",
        "unsent",
    )

    def __init__(self, sock: socket.socket, address: object, listener: object) -> None:
        self.sock = sock
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        self.address = address
        self.listener = listener
        #: What of a request's environment is the connection's (``environ.Gateway``).
        self.environ: dict[str, Any] | None = None
        self.buffer = bytearray()
        self._state = State.ACCEPTED
        #: The client has said that it sends no more: over TLS, no poll tells that again.
        self.has_ended = False
        #: When the loop took it, by the loop's clock.
        self.accepted_at = 0.0
        self.deadline = 0.0
        self.requests = 0
        #: The last head was refused before any application saw it.
        self.bad_head = False
        self.lingered = 0
        #: What of an answer the client has not taken; no further request is looked at until then.
        self.unsent = b""
        #: The connection ends with that answer.
        self.is_last = False
        #: When the client last took a byte of it, and what the kernel had still to send then.
        self.taken_at = 0.0
        self.send_queue = b""
        self._scanned = 0

    @property
    def state(self) -> State:
        """What the connection waits for."""
        return self._state

    def move(self, new: State) -> Deadline:
        """Go on to another state; return which deadline it has.

        Raises:
            IllegalTransition: it is not in the table.
        """
        try:
            _, deadline = TRANSITIONS[self._state][new]
        except KeyError:
            raise IllegalTransition(f"{self._state.name} to {new.name}") from None
        self._state = new
        return deadline

    @property
    def client(self) -> str:
        """The client's IP address; of a Unix socket, ``unix``."""
        return str(self.address[0]) if isinstance(self.address, tuple) else "unix"

    def is_idle(self) -> bool:
        """Tell whether no part of a request has arrived."""
        return self._state in _BEFORE_REQUEST and not self.has_begun()

    def shake_hands(self) -> None:
        """Go on with the TLS handshake, until it is done; raises what it waits for."""
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def receive(self) -> bool:
        """Read what has arrived of a head; False where the client has closed."""
        data = self.sock.recv(_RECORD if self.is_tls else _AT_ONCE)
        self.buffer += data
        self.has_ended = not data
        return not self.has_ended

    def receive_decrypted(self) -> None:
        """Read what TLS has decrypted along with a body and nobody has asked for yet.

        No poll tells of it. A body may end anywhere in a record, and the next head follow.
        """
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            self.receive()

    def has_head(self) -> bool:
        """Tell whether a whole head has arrived, or so much that it will be refused."""
        buffer = self.buffer
        if not buffer:
            return False
        # A head may follow empty lines (RFC 9112 section 2.2), which are no end of one.
        while buffer.startswith((b"\r\n", b"\n")):
            del buffer[: 2 if buffer[0] == 13 else 1]  # noqa: PLR2004 - CR
        start = max(0, self._scanned - 3)
        self._scanned = len(buffer)
        has_end = buffer.find(_END, start) >= 0 or any(buffer.find(e, start) >= 0 for e in _ENDS)
        if has_end or len(buffer) > MAX_HEAD:
            self._scanned = 0
            return True
        return False

    def take_head(self) -> bytes:
        """Take a complete head off the buffer; all of it where that has no proper end."""
        end = self.buffer.find(_END)
        head = bytes(self.buffer[: end + len(_END)] if end >= 0 else self.buffer)
        del self.buffer[: len(head)]
        return head

    def has_begun(self) -> bool:
        """Tell whether a part of a head has arrived; the beginning of an empty line is none.

        After ``has_head``, which drops empty lines.
        """
        return bool(self.buffer) and self.buffer != b"\r"

    def send(self) -> None:
        """Send of the answer what the socket takes now: all of it, or it raises.

        Raises:
            BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError: there is more.
            OSError: the connection broke.
        """
        while self.unsent:
            # TLS wants to be offered the very same bytes again after it has blocked.
            self.unsent = self.unsent[self.sock.send(self.unsent) :]

    def stalls(self, now: float, seconds: float) -> bool:
        """Tell whether the client has taken no byte of the answer for so long."""
        queue = send_queue(self.sock)
        if queue != self.send_queue:
            self.taken_at, self.send_queue = now, queue
        return now - self.taken_at >= seconds

    def discard(self, scratch: memoryview) -> bool:
        """Discard what a refused client still sends; False at its end, or the limit."""
        # Below TLS: what is discarded need not be decrypted.
        count = socket.socket.recv_into(self.sock, scratch)
        self.lingered += count
        return count > 0 and self.lingered < LINGER_BYTES

    def send_close_notify(self) -> None:
        """Over TLS, tell the client that what was sent is complete (RFC 8446 section 6.1)."""
        if isinstance(self.sock, ssl.SSLSocket):
            # It then looks for the client's own close_notify, which need not have come.
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()

    def shutdown(self, how: int) -> None:
        """Shut the socket down, below TLS; any thread may."""
        socket.socket.shutdown(self.sock, how)

    def close(self) -> None:
        """Close the socket. Never fails, may be called twice."""
        if self._state is not State.CLOSED:
            self.move(State.CLOSED)
        with contextlib.suppress(OSError):
            self.sock.close()
