# SPDX-License-Identifier: Apache-2.0
"""The threads of a worker: each serves one connection's requests, then takes another.

Probes (OPTIONS, HEAD) have threads of their own, so that they never queue behind transfers. Probe
threads never wait: a probe that only the back end can answer is made again on a thread that may
wait. So a back end that hangs delays only the probes of its own images.

    OPTIONS, HEAD --> [ probe: 8 ] --WouldWait--> [ asking: 16 ]
                              `--WouldTransfer--.
    all else      -----------> [ transfer ] <---'    an admin listener's --> [ admin: 2 ]

A transfer that finds no thread is answered 503 at once. Each admin listener has threads and an
application of its own; its connections do not count as busy.

A thread that has answered waits a moment for the connection's next request before it hands the
connection back to the loop: for small requests, the way through the loop and another thread costs
more than the request itself. It waits 20 ms where half of the threads or more have nothing to do,
else one.
"""

import contextlib
import logging
import select
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from imageserver.core.errors import ClientGone
from imageserver.images.probing import Asking, WouldTransfer, WouldWait
from imageserver.observability.metrics.counted import Metrics
from imageserver.server.connection import Connection
from imageserver.server.environ import Gateway
from imageserver.server.exchange import Application, cut, serve
from imageserver.server.loop import Loop
from imageserver.server.states import State
from imageserver.server.threads import NoThread, Threads
from imageserver.server.tls import wire_over
from imageserver.server.wire import BLOCKED, refused_head

log = logging.getLogger(__name__)

#: Threads for probes that are answered at once.
PROBE_THREADS = 8
#: Threads for probes that have to ask a back end. Each may wait a second for a silent one.
ASKING_THREADS = 16
#: A probe that had to wait longer than this for such a thread is answered without asking: all
#: threads wait for servers that hang, and the waits of those in front would add up.
_ASKING_SECONDS = 0.5
#: Probes that may wait for a probe thread; a second's worth at the usual rate.
_PROBE_BACKLOG = 1024
#: How long a thread waits for a connection's next request, in milliseconds. A client on the same
#: host needs 0.1 ms for it, one in the same building 0.5 ms;
_SHORT_WAIT_MS = 1
#: one that writes what it gets to a disk, or looks for zeros, a few more.
_LONG_WAIT_MS = 20
_PROBES = (b"OPTIONS ", b"HEAD ")
#: Threads for an admin listener. Its answers take milliseconds.
_ADMIN_THREADS = 2
_ADMIN_BACKLOG = 64


class _Pool:
    """Threads, and the connections that they have or that are queued for them."""

    app: Application

    def __init__(self, name: str, threads: int, room: int, *, answers_once: bool = False) -> None:
        self._threads = Threads(name, threads)
        self.threads = threads
        self.room = room
        #: Each answer is the last on its connection.
        self.answers_once = answers_once
        self.connections: set[Connection] = set()
        #: Those of them that wait for their next request: their threads are free in a moment.
        self.between_requests: set[Connection] = set()

    def is_wanted(self) -> bool:
        """Tell whether connections wait for a thread."""
        return len(self.connections) > self.threads

    def wait_ms(self) -> int:
        """Return how long to wait for a connection's next request, in milliseconds."""
        has_many = 2 * len(self.connections) <= self.threads and not self._threads.is_short
        return _LONG_WAIT_MS if has_many else _SHORT_WAIT_MS

    def start(self) -> None:
        self._threads.start()

    def submit(self, work: Callable[..., None], *arguments: object) -> None:
        may_wait = self.room > self.threads or bool(self.between_requests)
        self._threads.submit(partial(work, *arguments), may_wait=may_wait)


class Pools:
    """Hands connections with complete heads to threads, and back to the loop."""

    def __init__(
        self,
        threads: int,
        client_timeout: float,
        changed: Callable[[], None],
        metrics: Metrics,
    ) -> None:
        """``changed`` is called whenever ``busy`` may return another number."""
        self._metrics = metrics
        self._changed = changed
        self._client_timeout = client_timeout
        self._transfers = _Pool("transfer", threads, threads)
        self._probes = _Pool("probe", PROBE_THREADS, _PROBE_BACKLOG)
        self._asking = _Pool("asking", ASKING_THREADS, _PROBE_BACKLOG)
        #: By the name of the listener whose connections it serves.
        self._admin: dict[object, _Pool] = {}
        #: One token for each hand-over to a thread that is not over yet.
        self._handovers: set[object] = set()
        self._gateway: Gateway
        self._loop: Loop
        self.last = False
        """True: every answer is the last on its connection."""

    def start(self, app: Application, cfg: Any, loop: Loop) -> None:
        """Say what is served, and where connections go afterwards."""
        self._transfers.app = self._probes.app = self._asking.app = app
        for pool in (self._probes, self._asking):
            pool.start()  # there may be no threads to be had when they are needed most
        self._gateway, self._loop = Gateway(cfg), loop

    def reserve(self, listener: object, app: Application) -> None:
        """Give a listener's connections, by its name, their own threads and application."""
        pool = _Pool("admin", _ADMIN_THREADS, _ADMIN_BACKLOG, answers_once=True)
        self._admin[listener] = pool
        pool.app = app
        pool.start()

    def busy(self) -> int:
        """Return how many connections are with transfer threads."""
        return len(self._transfers.connections)

    def is_empty(self) -> bool:
        """Tell whether no thread has a connection."""
        return not self._handovers

    def dispatch(self, conn: Connection) -> None:
        """Queue a connection with a complete head for a thread, or refuse its request."""
        self._dispatch_to(self._pool_of(conn), conn)

    def _transfer(self, conn: Connection) -> None:
        """Queue a probe that takes as long as a transfer."""
        self._dispatch_to(self._transfers, conn)

    def _dispatch_to(self, pool: _Pool, conn: Connection) -> None:
        if len(pool.connections) - len(pool.between_requests) >= pool.room:
            self._refuse(conn)
            return
        self._hand_to(pool, conn)

    def _ask_elsewhere(self, conn: Connection) -> None:
        """Queue a probe for a thread that may wait for a back end."""
        self._hand_to(self._asking, conn)

    def _hand_to(self, pool: _Pool, conn: Connection) -> None:
        conn.move(State.QUEUED)
        pool.connections.add(conn)
        # Until it is back in the loop, or closed: only then may a worker that drains end. The
        # connection itself cannot be the token: another thread may have it before this one ends.
        handover = object()
        self._handovers.add(handover)
        self._changed()
        try:
            pool.submit(self._work, pool, conn, handover, time.monotonic())
        except NoThread:
            pool.connections.discard(conn)
            self._changed()
            self._refuse(conn)
            self._handovers.discard(handover)

    def _refuse(self, conn: Connection) -> None:
        self._metrics.refused("server_busy")
        answer = refused_head(conn.client, 503, "server busy", conn.buffer, retry=True)
        self._loop.refuse(conn, answer)

    def _pool_of(self, conn: Connection) -> _Pool:
        admin = self._admin.get(conn.listener)
        if admin:
            return admin
        return self._probes if conn.buffer.startswith(_PROBES) else self._transfers

    def abort(self, seconds: float) -> None:
        """Cut every connection; give the threads a moment to give back what they hold."""
        deadline = time.monotonic() + seconds
        while not self.is_empty() and time.monotonic() < deadline:
            for pool in (self._transfers, self._probes, self._asking, *self._admin.values()):
                for conn in list(pool.connections):
                    with contextlib.suppress(OSError):
                        conn.shutdown(socket.SHUT_RDWR)
            time.sleep(0.01)

    # On a thread

    def _work(self, pool: _Pool, conn: Connection, handover: object, since: float) -> None:
        after: Callable[[Connection], None] = self._loop.close
        try:
            conn.move(State.WORK)
            after = self._serve(pool, conn, self._may_ask(pool, since))
        except WouldTransfer:
            after = self._transfer
        except WouldWait:
            after = self._ask_elsewhere
        except ClientGone:
            cut(conn.sock)
        except BaseException:
            log.exception("connection lost")
            cut(conn.sock)
        finally:
            pool.connections.discard(conn)
            self._changed()
            try:
                after(conn)
            finally:
                self._handovers.discard(handover)

    def _may_ask(self, pool: _Pool, since: float) -> Asking:
        if pool is self._probes:
            return Asking.ELSEWHERE
        if pool is self._asking and time.monotonic() - since > _ASKING_SECONDS:
            return Asking.NEVER
        return Asking.NOW

    def _serve(self, pool: _Pool, conn: Connection, asking: Asking) -> Callable[[Connection], None]:
        """Answer as long as requests follow at once; return what to do with the connection then.

        Raises:
            ClientGone, WouldWait: see ``serve``.
        """
        wire = wire_over(conn.sock, self._client_timeout)
        arrival = select.poll()
        arrival.register(conn.sock, select.POLLIN)

        def is_last() -> bool:
            return self.last or pool.answers_once

        while serve(conn, wire, pool.app, self._gateway, is_last, asking=asking):
            if conn.unsent or not self._has_next(pool, conn, arrival):
                return self._loop.linger if conn.has_ended else self._loop.keep
            # A transfer goes to the transfer threads; a probe any thread may answer.
            is_transfer = pool is not self._transfers and self._pool_of(conn) is self._transfers
            if is_transfer or pool.is_wanted():
                return self.dispatch
            if asking is Asking.NEVER:
                asking = Asking.NOW  # the next request has not waited yet
        if conn.bad_head:
            self._metrics.refused("bad_head")
        return self._loop.linger

    def _has_next(self, pool: _Pool, conn: Connection, arrival: "select.poll") -> bool:
        conn.receive_decrypted()
        if conn.has_head():
            return True
        if pool.is_wanted() or self.last:
            return False
        has_head = _receives_head(conn)  # at once: most clients are as fast as this thread
        if has_head is None:
            pool.between_requests.add(conn)
            arrived = arrival.poll(pool.wait_ms())
            pool.between_requests.discard(conn)
            has_head = bool(arrived) and _receives_head(conn)
        return bool(has_head)


def _receives_head(conn: Connection) -> bool | None:
    """Tell whether a whole head has arrived; None where no byte has.

    Raises:
        ClientGone: the connection broke.
    """
    try:
        return conn.receive() and conn.has_head()
    except BLOCKED:
        return None
    except OSError as exc:
        raise ClientGone from exc
