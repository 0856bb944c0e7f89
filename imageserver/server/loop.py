# SPDX-License-Identifier: Apache-2.0
"""The loop of a worker: everything that waits for a client and needs no thread.

It accepts, reads heads, keeps idle connections, sends what clients have not taken of small
answers, and lets refused clients finish. It never
blocks and does no work of its own; a connection whose head is complete goes to ``dispatch``
and is the loop's again when a thread hands it back. Epoll events are one-shot, so a
connection is never looked at by two threads.
"""

import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from imageserver.core.entry import fields
from imageserver.core.errors import NO_DESCRIPTOR
from imageserver.observability.metrics.counted import Metrics
from imageserver.server.connection import LINGER_SECONDS, Connection, State
from imageserver.server.shortage import Reserve, Seldom
from imageserver.server.tls import forget_errors, has_ended
from imageserver.server.wire import BLOCKED, LOOKS, awaited, in_flight, refused_head

log = logging.getLogger(__name__)

#: How late a timeout may be noticed, in seconds.
TICK = 0.25
#: How long accepting rests when no file descriptor is free, and none can be freed.
_FULL_SECONDS = 0.1
#: Connections that wait at most, whatever the limit on descriptors.
MOST_WAITING = 8192


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may wait, in seconds."""

    head: float
    """For a whole head; and for a byte of an answer to be taken."""
    idle: float
    """Between requests."""


def _anybody(_peer: socket.socket) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Door:
    """How a listening socket lets clients in."""

    tls: ssl.SSLContext | None = None
    """With which they speak TLS."""
    spreads: bool = True
    """Busy workers leave connections to the others."""
    admits: Callable[[socket.socket], bool] = _anybody


class Loop:
    """Connections that wait. ``keep`` and ``linger`` may be called from any thread."""

    def __init__(
        self,
        patience: Patience,
        dispatch: Callable[[Connection], None],
        hesitate: Callable[[], float],
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``hesitate``: for how long to leave a new connection to the other workers."""
        self._now = now
        self._patience = patience
        self._dispatch = dispatch
        self._hesitate = hesitate
        self._metrics = metrics
        self._epoll = select.epoll()
        self._listeners: dict[int, Any] = {}
        self._doors: dict[int, Door] = {}
        self._paused: dict[int, float] = {}
        self._events: dict[int, Callable[[], None]] = {}
        self._waiting: dict[int, Connection] = {}
        self._arming = threading.Lock()
        self._expired = 0.0
        self._warnings = Seldom(log)
        self._reserve = Reserve()
        #: Connections that wait at most; beyond, the one with the least time left goes.
        self.most_waiting = MOST_WAITING
        self._scratch = memoryview(bytearray(256 * 1024))

    def listen(self, listener: Any, door: Door) -> None:
        """Accept from a listening socket."""
        listener.setblocking(0)
        self._doors[listener.fileno()] = door
        self._listeners[listener.fileno()] = listener
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever ``fd`` is readable."""
        self._events[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Stop watching ``fd``."""
        del self._events[fd]
        self._paused.pop(fd, None)
        self._epoll.unregister(fd)

    def is_empty(self) -> bool:
        """Tell whether no connection waits."""
        return not self._waiting

    def step(self) -> None:
        """Wait for something to happen, at most a tick, and see to it."""
        now = self._now()
        timeout = min([TICK, *(due - now for due in self._paused.values())])
        for fd, _ in self._epoll.poll(max(0.0, timeout)):
            if fd in self._waiting:
                self._on_connection(self._waiting[fd])
            elif fd in self._listeners:
                self._on_listener(fd)
            elif fd in self._events:
                self._events[fd]()
        now = self._now()
        for fd in [fd for fd, due in self._paused.items() if due <= now]:
            del self._paused[fd]
            self._epoll.modify(fd, select.EPOLLIN)
            if fd in self._listeners:
                self._accept(self._listeners[fd])
        if now - self._expired >= TICK:
            self._expired = now
            self._expire(now)
            self._reserve.fill(self._epoll.fileno())

    def _expire(self, now: float) -> None:
        # A copy, made at once: threads hand connections back while we look.
        for conn in [conn for conn in list(self._waiting.values()) if conn.deadline <= now]:
            if conn.state is State.HANDSHAKE:
                self._metrics.tls_failed()
            if conn.state is State.HEAD and conn.has_begun():
                self._metrics.refused("head_timeout")
                self.refuse(conn, refused_head(conn.client, 408, "request head took too long"))
            elif conn.state is State.SENDING and not conn.stalls(now, self._patience.head):
                conn.deadline = now + self._patience.head / LOOKS
            else:
                self._close_silent(conn)

    # Accepting

    def _on_listener(self, fd: int) -> None:
        seconds = self._hesitate() if self._doors[fd].spreads else 0.0
        if seconds:
            self._pause(fd, seconds)
        else:
            self._accept(self._listeners[fd])

    def _pause(self, fd: int, seconds: float) -> None:
        self._epoll.modify(fd, 0)
        self._paused[fd] = self._now() + seconds

    def _accept(self, listener: Any) -> None:
        try:
            sock, address = listener.accept()
        except OSError as exc:
            if exc.errno in NO_DESCRIPTOR:
                self.make_room(listener.fileno())
            return  # else another worker was quicker, or the client has gone
        door = self._doors[listener.fileno()]
        if not door.admits(sock):
            self._metrics.turned_away("not_admitted")
            sock.close()
            return
        sock.settimeout(0)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if door.tls:
            try:
                sock = door.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except OSError:
                forget_errors()
                return  # the client has gone
        if door.spreads:
            self._metrics.accepted()
        if len(self._waiting) >= self.most_waiting:
            self._metrics.turned_away("too_many")
            self._close_least()
        conn = Connection(sock, address or "unix", listener.getsockname())
        self._epoll.register(sock.fileno(), 0)
        self._wait_for(conn, State.HANDSHAKE if door.tls else State.HEAD, self._patience.head)

    def make_room(self, fd: int) -> None:
        """Free a descriptor for who waits at the listening socket ``fd``, or let it rest."""
        self._metrics.turned_away("no_descriptor")
        self._warnings.warn("no file descriptor is free for another connection")
        if not (self._close_least() or self._reserve.spend()):
            self._pause(fd, _FULL_SECONDS)

    def _close_least(self) -> bool:
        """Close the connection with the least time left, one without a request if any."""
        with self._arming:
            waiting = list(self._waiting.values())
            if waiting:
                self.close(min(waiting, key=lambda conn: (not conn.is_idle(), conn.deadline)))
        return bool(waiting)

    # Connections that wait

    def _on_connection(self, conn: Connection) -> None:
        more, events = True, select.POLLIN
        try:
            if conn.state is State.LINGER:
                more = conn.drop(self._scratch)
            elif conn.state is State.HANDSHAKE:
                conn.shake_hands()
            elif conn.state is State.SENDING:
                events = select.POLLOUT
                conn.moved = self._now()  # there is room because the client has taken something
                conn.send()
                self._on_sent(conn)
                return
            else:
                more = conn.receive()
                if conn.has_head():
                    self._hand_over(conn)
                    return
                # Once a request: empty lines between requests are no progress.
                if conn.state is State.IDLE and conn.has_begun():
                    conn.state = State.HEAD
                    conn.deadline = self._now() + self._patience.head
        except BLOCKED as exc:
            events = awaited(exc, events)
        except OSError as exc:
            self._on_broken(conn, exc)
            return
        if more:
            self._epoll.modify(conn.sock.fileno(), events | select.EPOLLONESHOT)
        else:
            self.close(conn)

    def _hand_over(self, conn: Connection) -> None:
        del self._waiting[conn.sock.fileno()]
        self._dispatch(conn)

    def _on_sent(self, conn: Connection) -> None:
        if conn.is_last:
            self.linger(conn)
            return
        conn.receive_decrypted()
        if conn.has_head():
            self._hand_over(conn)
        else:
            self.keep(conn)

    def _on_broken(self, conn: Connection, exc: OSError) -> None:
        if isinstance(exc, ssl.SSLError) and not has_ended(exc):
            if conn.state is State.HANDSHAKE:
                self._metrics.tls_failed()
            log.info("TLS failed", extra=fields(client=conn.client, detail=exc.reason))
            conn.unsent = b""
            self.linger(conn)  # so that the alert that tells the client why arrives
        else:
            self.close(conn)

    def keep(self, conn: Connection) -> None:
        """Wait for a connection's next request, once its client has taken the answer."""
        if conn.unsent:
            self._send(conn, is_last=False)
        elif conn.has_begun():
            self._wait_for(conn, State.HEAD, self._patience.head)
        else:
            self._wait_for(conn, State.IDLE, self._patience.idle)

    def _send(self, conn: Connection, *, is_last: bool) -> None:
        conn.is_last = is_last
        conn.moved, conn.queued = self._now(), in_flight(conn.sock)
        self._wait_for(conn, State.SENDING, self._patience.head / LOOKS, select.EPOLLOUT)

    def refuse(self, conn: Connection, answer: bytes) -> None:
        """Give a last answer without a thread."""
        conn.unsent = answer
        try:
            conn.send()
        except BLOCKED:
            pass
        except OSError:
            conn.unsent = b""  # the client has gone
        self.linger(conn)

    def linger(self, conn: Connection) -> None:
        """Half-close, then read and drop, so that the answer reaches a client that still sends.

        Once the client has taken that answer.
        """
        if conn.unsent:
            self._send(conn, is_last=True)
            return
        conn.farewell()
        try:
            conn.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(conn)
        else:
            self._wait_for(conn, State.LINGER, LINGER_SECONDS)

    def _wait_for(
        self, conn: Connection, state: State, seconds: float, events: int = select.EPOLLIN
    ) -> None:
        conn.state = state
        conn.deadline = self._now() + seconds
        fd = conn.sock.fileno()
        with self._arming:  # before both are done, nobody may close it for its descriptor
            self._waiting[fd] = conn
            # Last: from here on the loop may act on it.
            self._epoll.modify(fd, events | select.EPOLLONESHOT)

    def _close_silent(self, conn: Connection) -> None:
        if conn.state in {State.HEAD, State.IDLE}:
            conn.farewell()
        self.close(conn)

    def close(self, conn: Connection) -> None:
        """Close a connection, whoever has it."""
        self._waiting.pop(conn.sock.fileno(), None)
        conn.close()

    # Stopping

    def close_listeners(self) -> None:
        """Accept no more; the port is free for others at once."""
        for fd, listener in self._listeners.items():
            self._epoll.unregister(fd)
            listener.close()
        self._listeners.clear()
        self._doors.clear()
        self._paused.clear()

    def close_idle(self) -> None:
        """Close the connections of which no part of a request has arrived."""
        for conn in list(self._waiting.values()):
            if conn.is_idle():
                self._close_silent(conn)

    def close_all(self) -> None:
        """Close every connection that waits."""
        for conn in list(self._waiting.values()):
            self.close(conn)
