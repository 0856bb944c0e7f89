# SPDX-License-Identifier: Apache-2.0
"""Listening sockets on the worker's loop: which clients are let in, and when.

All workers accept from the same sockets. A busy one leaves a new connection for a moment to the
others, who hear of it too: otherwise the kernel gives most of them to one worker. So does one that
has just accepted and does not know yet how busy that will make it: the connections of one client,
which come together, would all be its own, for it is awake. Where those stay silent, they make
nobody busy, so it takes more of them after each such moment.
"""

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from imageserver.core.errors import NO_DESCRIPTOR
from imageserver.observability.metrics.counted import Metrics
from imageserver.server.connection import Connection
from imageserver.server.loop import Loop
from imageserver.server.states import State
from imageserver.server.tls import forget_errors

#: For how long a connection without a request counts as just accepted.
_FRESH_SECONDS = 0.005
_WITHOUT_REQUEST = {State.HANDSHAKE, State.HEAD}
#: Connections accepted at once at most: no more than may wait however few descriptors there are
#: (``worker``), for each has to be read before others take its place.
_MOST_AT_ONCE = 16


def _admit_all(_client: socket.socket) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class AcceptPolicy:
    """How a listening socket lets clients in."""

    tls: ssl.SSLContext | None = None
    """With which they speak TLS."""
    spreads: bool = True
    """Busy workers leave connections to the others."""
    admits: Callable[[socket.socket], bool] = _admit_all


class Acceptors:
    """The listening sockets of a worker; on the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        accept_delay: Callable[[bool], float],
        metrics: Metrics,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``accept_delay``: for how many seconds to leave a new connection to other workers.

        It is told whether this one has just accepted one and not heard of a request yet.
        """
        self._now = now
        self._latest: Connection | None = None
        self._accepted_at = 0.0
        #: So many pauses in a row have brought no request of the connection accepted before them.
        self._silent_pauses = 0
        self._loop = loop
        self._accept_delay = accept_delay
        self._metrics = metrics
        self._listeners: list[Any] = []

    def listen(self, listener: Any, policy: AcceptPolicy) -> None:
        """Accept from a listening socket."""
        listener.setblocking(0)
        self._listeners.append(listener)
        self._loop.watch(listener.fileno(), partial(self._on_client, listener, policy))

    def close(self) -> None:
        """Accept no more; the port is free for others at once."""
        for listener in self._listeners:
            self._loop.forget(listener.fileno())
            listener.close()
        self._listeners.clear()

    def _on_client(self, listener: Any, policy: AcceptPolicy) -> None:
        if not policy.spreads:
            self._accept(listener, policy)
            return
        has_fresh = self._has_fresh()
        seconds = self._accept_delay(has_fresh)
        if seconds:
            then = partial(self._accept_some, listener, policy, had_fresh=has_fresh)
            self._loop.pause(listener.fileno(), seconds, then)
        else:
            self._accept_some(listener, policy, had_fresh=False)

    def _has_fresh(self) -> bool:
        return self._is_silent() and self._now() < self._accepted_at + _FRESH_SECONDS

    def _is_silent(self) -> bool:
        latest = self._latest
        return latest is not None and latest.requests == 0 and latest.state in _WITHOUT_REQUEST

    def _accept_some(self, listener: Any, policy: AcceptPolicy, *, had_fresh: bool) -> None:
        """Accept one connection; after pauses that brought no request, one more each time.

        So the few connections of one client are spread although TLS delays their requests, and
        thousands of silent ones, which at one for each pause took seconds, delay nobody.
        """
        self._silent_pauses = self._silent_pauses + 1 if had_fresh and self._is_silent() else 0
        for _ in range(min(max(1, self._silent_pauses), _MOST_AT_ONCE)):
            if not self._accept(listener, policy):
                break

    def _accept(self, listener: Any, policy: AcceptPolicy) -> bool:
        """Accept one connection; False where there is none, or no descriptor for it."""
        try:
            sock, address = listener.accept()
        except OSError as exc:
            if exc.errno in NO_DESCRIPTOR:
                accept = partial(self._accept_some, listener, policy, had_fresh=False)
                self._loop.free_descriptor(listener.fileno(), accept)
            return False  # else another worker was quicker, or the client has gone
        if not policy.admits(sock):
            self._metrics.turned_away("not_admitted")
            sock.close()
            return True
        sock.settimeout(0)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if policy.tls:
            try:
                sock = policy.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except OSError:
                forget_errors()
                return True  # the client has gone
        conn = Connection(sock, address or "unix", listener.getsockname())
        if policy.spreads:
            self._metrics.accepted()
            self._latest, self._accepted_at = conn, self._now()
        self._loop.add(conn)
        return True
