# SPDX-License-Identifier: Apache-2.0
"""One client connection, as the worker's loop sees it.

    accepted --> HANDSHAKE --> HEAD --complete--> WORK --answered--> IDLE --a byte--> HEAD
                (TLS only)      |                   |
                   |            |                   +--last answer--> LINGER --> closed
                   +------------+--too slow, too long, wrong: refused-> LINGER

    WORK, or a refusal --the client takes no more now--> SENDING --taken--> IDLE or LINGER

In WORK one thread owns the connection and the loop does not touch it; in the other states
the loop reads or sends, without waiting. So a client that is slow with its handshake or head,
takes no answer, or will not stop sending a body nobody wants, costs a file descriptor and no
thread. In SENDING nothing is read: a client has one answer outstanding at most.
"""

import contextlib
import socket
import ssl
from enum import Enum, auto

from imageserver.server.wire import in_flight

#: Longest head, in bytes: gunicorn's largest request line and a hundred fields of its default size
#: would be 800 KiB; clients of an image server need a few hundred bytes.
MAX_HEAD = 64 * 1024
#: A head ends with an empty line (RFC 9112 section 2.2). One made with bare LF is complete
#: too, so that the parser gets to refuse it at once.
_ENDS = (b"\r\n\r\n", b"\n\n", b"\n\r\n")
_SCRATCH = 64 * 1024

#: What a refused client may still send and have dropped, so that it lives to read the answer
#: (docs/api.md): many HTTP clients send their whole body before they read.
LINGER_SECONDS = 10.0
LINGER_BYTES = 1 << 30


class State(Enum):
    """What the connection waits for, and who reads from it."""

    HANDSHAKE = auto()
    HEAD = auto()
    IDLE = auto()
    WORK = auto()
    SENDING = auto()
    LINGER = auto()
    CLOSED = auto()


#: Where nothing of a request may have arrived.
_BEFORE_REQUEST = {State.HANDSHAKE, State.HEAD, State.IDLE}


class Connection:
    """A client's socket, what has been read ahead from it, and until when its state may last."""

    __slots__ = (
        "_scanned",
        "address",
        "bad_head",
        "buffer",
        "deadline",
        "is_last",
        "is_tls",
        "lingered",
        "listener",
        "moved",
        "queued",
        "requests",
        "sock",
        "state",
        "unsent",
    )

    def __init__(self, sock: socket.socket, address: object, listener: object) -> None:
        self.sock = sock
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        self.address = address
        self.listener = listener
        self.buffer = bytearray()
        self.state = State.HEAD
        self.deadline = 0.0
        self.requests = 0
        #: The last head was refused before any application saw it.
        self.bad_head = False
        self.lingered = 0
        #: What of an answer the client has not taken; no further request is looked at until then.
        self.unsent = b""
        #: The connection ends with that answer.
        self.is_last = False
        #: When the client last took a byte, and what the kernel had still to send then.
        self.moved = 0.0
        self.queued = b""
        self._scanned = 0

    @property
    def client(self) -> str:
        """The client's IP address; of a Unix socket, ``unix``."""
        return str(self.address[0]) if isinstance(self.address, tuple) else "unix"

    def is_idle(self) -> bool:
        """Tell whether no part of a request has arrived."""
        return self.state in _BEFORE_REQUEST and not self.has_begun()

    def shake_hands(self) -> None:
        """Go on with the TLS handshake; after it a head is next."""
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()
        self.state = State.HEAD

    def receive(self) -> bool:
        """Read what has arrived of a head; False where the client has closed."""
        data = self.sock.recv(_SCRATCH)
        self.buffer += data
        return bool(data)

    def receive_decrypted(self) -> None:
        """Read what TLS has decrypted along with a body and nobody has asked for yet.

        No poll tells of it. A body may end anywhere in a record, and the next head follow.
        """
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            self.receive()

    def has_head(self) -> bool:
        """Tell whether a whole head has arrived, or so much that it will be refused."""
        buffer = self.buffer
        # A head may follow empty lines (RFC 9112 section 2.2), which are no end of one.
        while buffer.startswith((b"\r\n", b"\n")):
            del buffer[: 2 if buffer[0] == 13 else 1]  # noqa: PLR2004 - CR
        start = max(0, self._scanned - 3)
        self._scanned = len(buffer)
        if len(buffer) > MAX_HEAD or any(buffer.find(end, start) >= 0 for end in _ENDS):
            self._scanned = 0
            return True
        return False

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
        queued = in_flight(self.sock)
        if queued != self.queued:
            self.moved, self.queued = now, queued
        return now - self.moved >= seconds

    def drop(self, scratch: memoryview) -> bool:
        """Read and forget what a lingering client sends; False where it has stopped, or must."""
        # Below TLS: what is dropped need not be decrypted.
        count = socket.socket.recv_into(self.sock, scratch)
        self.lingered += count
        return count > 0 and self.lingered < LINGER_BYTES

    def farewell(self) -> None:
        """Say that nothing more is sent (close_notify of RFC 8446): what was sent is complete."""
        if isinstance(self.sock, ssl.SSLSocket):
            # It then looks for the client's own farewell, which need not have come.
            with contextlib.suppress(OSError, ValueError):
                self.sock.unwrap()

    def shutdown(self, how: int) -> None:
        """Shut the socket down, below TLS; any thread may."""
        socket.socket.shutdown(self.sock, how)

    def close(self) -> None:
        """Close the socket. Never fails, may be called twice."""
        self.state = State.CLOSED
        with contextlib.suppress(OSError):
            self.sock.close()
