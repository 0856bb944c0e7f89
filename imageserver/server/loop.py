# SPDX-License-Identifier: Apache-2.0
"""The loop of a worker: everything that waits for a client and needs no thread.

It reads heads, keeps idle connections, sends what clients have not taken of small answers, and
lets refused clients finish. It never blocks and does no work of its own: a connection whose head
is complete goes to ``dispatch``, and comes back when a pool thread calls ``keep`` or ``linger``.
Connections are watched for one event at a time (EPOLLONESHOT), so two threads never look at one.
"""

import heapq
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from imageserver.core.entry import fields
from imageserver.observability.metrics.counted import Metrics
from imageserver.server.connection import LINGER_SECONDS, Connection
from imageserver.server.shortage import LimitedWarnings, Reserve
from imageserver.server.states import Deadline, State
from imageserver.server.tls import has_ended
from imageserver.server.wire import BLOCKED, LOOKS, awaited, refused_head, send_queue

log = logging.getLogger(__name__)

#: How late a timeout may be noticed, in seconds.
TICK = 0.25
#: How long accepting rests when no file descriptor is free, and none can be freed.
_FULL_SECONDS = 0.1
#: Connections that wait at most, whatever the limit on descriptors.
MOST_WAITING = 8192
#: Where one has to go, one in so many goes: looking through 8192 takes 2 ms, once for 128 clients.
_EVICTED_SHARE = 64
#: For so long a new connection is spared where it can be: its request may not have been read yet.
_GRACE_SECONDS = 1.0
_ANSWERED = {State.SENDING, State.LINGER}


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a connection may wait, in seconds."""

    client: float
    """For a whole head; and for a byte of an answer to be taken."""
    keepalive: float
    """Between requests."""


class Loop:
    """Connections that wait. ``keep``, ``refuse``, ``linger``, ``close``: from any thread."""

    def __init__(
        self,
        timeouts: Timeouts,
        dispatch: Callable[[Connection], None],
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._client_timeout = timeouts.client
        self._seconds = {
            Deadline.HEAD: timeouts.client,
            Deadline.KEEPALIVE: timeouts.keepalive,
            Deadline.PROGRESS: timeouts.client / LOOKS,
            Deadline.LINGER: LINGER_SECONDS,
        }
        self._dispatch = dispatch
        self._metrics = metrics
        self._epoll = select.epoll()
        #: What to call when a descriptor is readable.
        self._watched: dict[int, Callable[[], None]] = {}
        #: Descriptors not watched for a while: until when, and what to call then.
        self._paused: dict[int, tuple[float, Callable[[], None]]] = {}
        self._waiting: dict[int, Connection] = {}
        self._arming = threading.Lock()
        self._expired_at = 0.0
        self._warnings = LimitedWarnings(log)
        self._reserve = Reserve()
        #: Connections that wait at most; beyond, some are closed: see ``_evict``.
        self.most_waiting = MOST_WAITING
        self._scratch = memoryview(bytearray(256 * 1024))

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever ``fd`` is readable."""
        self._watched[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Stop watching ``fd``."""
        del self._watched[fd]
        self._paused.pop(fd, None)
        self._epoll.unregister(fd)

    def pause(self, fd: int, seconds: float, then: Callable[[], None]) -> None:
        """Do not watch ``fd`` for so long; then call ``then``, and watch it again."""
        self._epoll.modify(fd, 0)
        self._paused[fd] = self._now() + seconds, then

    def is_empty(self) -> bool:
        """Tell whether no connection waits."""
        return not self._waiting

    def step(self) -> None:
        """Wait for something to happen, at most a tick, and see to it."""
        now = self._now()
        timeout = min([TICK, *(due - now for due, _ in self._paused.values())])
        for fd, _ in self._epoll.poll(max(0.0, timeout)):
            if fd in self._waiting:
                self._on_connection(self._waiting[fd])
            elif fd in self._watched:
                self._watched[fd]()
        now = self._now()
        for fd in [fd for fd, (due, _) in self._paused.items() if due <= now]:
            _, then = self._paused.pop(fd)
            self._epoll.modify(fd, select.EPOLLIN)
            then()
        if now - self._expired_at >= TICK:
            self._expired_at = now
            self._expire(now)
            self._reserve.fill(self._epoll.fileno())

    def _expire(self, now: float) -> None:
        # A copy, made at once: threads hand connections back while we look.
        for conn in [conn for conn in list(self._waiting.values()) if conn.deadline <= now]:
            if conn.state is State.HANDSHAKE:
                self._metrics.tls_failed()
            if conn.state is State.HEAD and conn.has_begun():
                self._metrics.refused("head_timeout")
                message = "request head took too long"
                self.refuse(conn, refused_head(conn.client, 408, message, conn.buffer))
            elif conn.state is State.SENDING and not conn.stalls(now, self._client_timeout):
                conn.deadline = now + self._seconds[Deadline.PROGRESS]
            else:
                self._close_silent(conn)

    # Accepted connections

    def add(self, conn: Connection) -> None:
        """Take a connection that was just accepted."""
        if len(self._waiting) >= self.most_waiting:
            for _ in range(self._evict()):
                self._metrics.turned_away("too_many")
        conn.accepted_at = self._now()
        self._epoll.register(conn.sock.fileno(), 0)
        self._wait_in(State.HANDSHAKE if conn.is_tls else State.HEAD, conn)

    def free_descriptor(self, fd: int, accept: Callable[[], None]) -> None:
        """Free a descriptor for a client of the listening socket ``fd``, or accept later."""
        self._metrics.turned_away("no_descriptor")
        self._warnings.warn("no file descriptor is free for another connection")
        if not (self._evict() or self._reserve.spend()):
            self.pause(fd, _FULL_SECONDS, accept)

    def _evict(self) -> int:
        """Close some connections; return how many, none only where none waits.

        Those that have no request go first, begun or not, and among them who has the least time
        left; then those that have just been accepted, for a client that comes while others hold
        all the places has to be heard; then those that get an answer.
        """
        young = self._now() - _GRACE_SECONDS

        def rank(conn: Connection) -> tuple[int, float]:
            if conn.state in _ANSWERED:
                return 2, conn.deadline
            is_new = conn.state is not State.IDLE and conn.accepted_at > young
            return int(is_new), conn.deadline

        with self._arming:
            waiting = list(self._waiting.values())
        gone = heapq.nsmallest(max(1, len(waiting) // _EVICTED_SHARE), waiting, rank)
        for conn in gone:
            self.close(conn)
        return len(gone)

    # Connections that wait

    def _on_connection(self, conn: Connection) -> None:
        more, events = True, select.POLLIN
        try:
            if conn.state is State.LINGER:
                more = conn.discard(self._scratch)
            elif conn.state is State.HANDSHAKE:
                conn.shake_hands()
                self._enter(State.HEAD, conn)
            elif conn.state is State.SENDING:
                events = select.POLLOUT
                conn.taken_at = self._now()  # there is room because the client has taken a byte
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
                    self._enter(State.HEAD, conn)
        except BLOCKED as exc:
            events = awaited(exc, events)
        except OSError as exc:
            self._on_broken(conn, exc)
            return
        if more:
            self._epoll.modify(conn.sock.fileno(), events | select.EPOLLONESHOT)
        else:
            self._close_silent(conn)

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
        else:
            self._wait_in(State.HEAD if conn.has_begun() else State.IDLE, conn)

    def _send(self, conn: Connection, *, is_last: bool) -> None:
        conn.is_last = is_last
        conn.taken_at, conn.send_queue = self._now(), send_queue(conn.sock)
        self._wait_in(State.SENDING, conn, select.EPOLLOUT)

    def refuse(self, conn: Connection, answer: bytes) -> None:
        """Give a last answer that no application has made."""
        conn.unsent = answer
        try:
            conn.send()
        except BLOCKED:
            pass
        except OSError:
            conn.unsent = b""  # the client has gone
        self.linger(conn)

    def linger(self, conn: Connection) -> None:
        """End a connection after its last answer, once the client has taken that.

        Our direction is shut down; what the client still sends is read and discarded, so that
        the answer reaches a client that sends its whole body before it reads.
        """
        if conn.unsent:
            self._send(conn, is_last=True)
            return
        conn.send_close_notify()
        try:
            conn.shutdown(socket.SHUT_WR)
        except OSError:
            self.close(conn)
        else:
            self._wait_in(State.LINGER, conn)

    def _enter(self, state: State, conn: Connection) -> None:
        deadline = conn.move(state)
        if deadline is not Deadline.UNCHANGED:
            conn.deadline = self._now() + self._seconds[deadline]

    def _wait_in(self, state: State, conn: Connection, events: int = select.EPOLLIN) -> None:
        self._enter(state, conn)
        fd = conn.sock.fileno()
        with self._arming:  # before both are done, nobody may close it for its descriptor
            self._waiting[fd] = conn
            # Last: from here on the loop may act on it.
            self._epoll.modify(fd, events | select.EPOLLONESHOT)

    def _close_silent(self, conn: Connection) -> None:
        if conn.state in {State.HEAD, State.IDLE}:
            conn.send_close_notify()
        self.close(conn)

    def close(self, conn: Connection) -> None:
        """Close a connection, whichever thread owns it."""
        self._waiting.pop(conn.sock.fileno(), None)
        conn.close()

    # Stopping

    def close_idle(self) -> None:
        """Close the connections of which no part of a request has arrived."""
        for conn in list(self._waiting.values()):
            if conn.is_idle():
                self._close_silent(conn)

    def close_all(self) -> None:
        """Close every connection that waits."""
        for conn in list(self._waiting.values()):
            self.close(conn)
