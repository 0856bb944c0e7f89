# SPDX-License-Identifier: Apache-2.0
"""Connections to NBD servers kept for a moment, so that a client that goes on need not wait.

A connection is kept only where the server takes several clients (multi-conn) and the request that
had it left nothing under way. It is used by one request at a time. Of each image (a server's socket
and an export) a worker keeps one: of those that ran side by side, the others go with the next look,
and what was kept for another transfer goes at once.

A thread looks twenty times a second, as long as something is kept. A connection is closed

1. before it has been idle for ``IMAGESERVER_NBD_IDLE_SECONDS``, and at the age of five seconds
   when it is not in use, so that a size that has changed is seen;
2. when its transfer, the only one that it serves, has ended or says something else. No request
   that has seen that uses it; a control program that unregisters a transfer is answered after it
   was closed (``ports.Hold``);
3. when another server has the path of the socket;
4. when somebody waits at that socket to be let in, a process of ours or not, or was turned away;
5. when this process drains.
"""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from imageserver.backends.nbd.connection import Connection, close_all
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.nbd.peers import crowded
from imageserver.core.holds import Hold, Holds
from imageserver.core.transfer import Transfer

#: How often kept connections are looked at.
LOOK_SECONDS = 0.05
#: The age at which a connection is not kept any more.
_MOST_AGE_SECONDS = 5.0
#: For so long after its last use, whether somebody waits at a socket is looked for.
_USED_SECONDS = 1.0
#: Most connections that a worker keeps, each with two descriptors (``server/worker.py``).
MOST_KEPT = 32
#: More servers that take no other client than one worker has to do with before it is replaced.
_MOST_FULL = 1024

_Server = tuple[int, ...]
_Key = tuple[_Server, str]


@dataclass(slots=True, eq=False)
class Kept:
    """A connection, and the transfer that it serves."""

    connection: Connection
    image: NbdImage
    transfer: Transfer | None
    hold: Hold | None = None
    since: float = 0.0
    """When its last use ended (monotonic clock)."""

    @property
    def key(self) -> _Key:
        """Which image it is."""
        return self.connection.server, self.image.export

    def fits(self, image: NbdImage, contexts: Collection[str], transfer: Transfer) -> bool:
        """Tell whether a request may have it: its transfer, and its place where that is locked."""
        return (
            self.transfer is not None
            and transfer.is_still(self.transfer)
            and image.at in {None, self.image.at}
            and self.connection.contexts.issuperset(contexts)
            and self.connection.is_alive()
        )

    def close(self) -> None:
        """Close the connection, then say so. Never fails."""
        self.connection.close()
        self.release()

    def release(self) -> None:
        """Let the transfer go."""
        hold, self.hold = self.hold, None
        if hold:
            hold.close()


class Pool:
    """The connections that this process keeps. Thread-safe."""

    def __init__(
        self,
        seconds: float,
        holds: Holds,
        *,
        now: Callable[[], float] = time.monotonic,
        waited_for: Callable[[Collection[_Server]], set[_Server]] = crowded,
    ) -> None:
        """``seconds``: how long a connection may be idle; 0: none is kept.

        ``waited_for`` returns at which of some sockets somebody waits to be let in.
        """
        self.seconds = seconds
        self._holds = holds
        self._now = now
        self._waited_for = waited_for
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._idle: dict[_Key, list[Kept]] = {}
        self._count = 0
        #: Sockets where something was kept, by the time of the last use.
        self._used: dict[_Server, float] = {}
        self._crowded: set[_Server] = set()
        #: Servers that have turned one of us away, or take one client: nothing is kept there.
        self._full: set[_Server] = set()
        self._looking: threading.Thread | None = None
        self._is_draining = False
        #: The thread must look now.
        self._is_told = False

    @property
    def lasts_seconds(self) -> float:
        """How long a connection that any worker keeps idle may take a place at its server."""
        return self.seconds + 2 * LOOK_SECONDS if self.seconds else 0.0

    def keeps(self, server: _Server | None) -> bool:
        """Tell whether connections to a server may be kept."""
        return bool(server and self.seconds and server not in self._full and not self._is_draining)

    def take(
        self, server: _Server, image: NbdImage, contexts: Collection[str], transfer: Transfer
    ) -> Kept | None:
        """Return what is kept for a transfer, and was asked for these contexts, if anything."""
        while kept := self._pop((server, image.export), transfer.id):
            if kept.fits(image, contexts, transfer):
                return kept
            kept.close()
        return None

    def _pop(self, key: _Key, name: str) -> Kept | None:
        """Take out what was kept for a transfer of this id last."""
        with self._lock:
            stack = self._idle.get(key, [])
            for kept in reversed(stack):
                if _name(kept) == name:
                    stack.remove(kept)
                    self._count -= 1
                    return kept
        return None

    def give(self, kept: Kept) -> None:
        """Keep a connection on which nothing is under way, or close it."""
        replaced = [kept]
        if self._may_keep(kept) and self._is_held(kept):
            replaced = self._put(kept)
        for each in replaced:
            each.close()

    def _may_keep(self, kept: Kept) -> bool:
        server = kept.connection.server
        if not (kept.transfer and self.keeps(server)):
            return False
        if not kept.connection.multi_conn:
            self.is_full(server)
            return False
        return self._now() <= kept.connection.opened + _MOST_AGE_SECONDS

    def _is_held(self, kept: Kept) -> bool:
        if kept.hold is None and kept.transfer:
            kept.hold = self._holds.hold(kept.transfer)
        return kept.hold is not None

    def _put(self, kept: Kept) -> list[Kept]:
        """Keep it; return what is to be closed for that: what other transfers left there, or it."""
        server = kept.connection.server
        kept.since = self._now()
        with self._lock:
            if self._is_draining or server in self._crowded or self._count >= MOST_KEPT:
                return [kept]
            if self._looking is None and not self._start():
                return [kept]
            self._used[server] = kept.since
            stack = self._idle.setdefault(kept.key, [])
            name = _name(kept)
            others = [other for other in stack if _name(other) != name]
            for other in others:
                stack.remove(other)
            stack.append(kept)
            self._count += 1 - len(others)
        return others

    def _start(self) -> bool:
        looking = threading.Thread(target=self._look_on, name="links", daemon=True)
        try:
            looking.start()
        except RuntimeError:  # the system has no thread
            return False
        self._looking = looking
        return True

    def is_full(self, server: _Server) -> None:
        """Keep nothing at a server that has no room to spare, until its socket is another one."""
        with self._lock:
            self._note_full({server})
            self._tell()

    def is_turned_away(self, server: _Server) -> None:
        """Have every process keep nothing at a server that has hung up on us."""
        if server and server not in self._full:
            self.is_full(server)
            self._holds.turned_away(server)

    def _note_full(self, servers: set[_Server]) -> None:
        if len(self._full) >= _MOST_FULL:
            self._full.clear()
        self._full |= servers

    def is_waited_for(self, server: _Server) -> None:
        """Close what is kept at a server at which somebody waits to be let in."""
        with self._lock:
            if server in self._used:
                self._crowded.add(server)
                self._tell()

    def drain(self) -> None:
        """Close what is kept, at once, and keep nothing any more. Does not wait."""
        with self._lock:
            self._is_draining = True
            self._tell()

    def _tell(self) -> None:
        self._is_told = True
        self._changed.notify()

    # The thread that looks

    def _look_on(self) -> None:
        while True:
            with self._lock:
                if not (self._count or self._used):
                    self._looking = None
                    return
                if not self._is_told:
                    self._changed.wait(LOOK_SECONDS)
                self._is_told = False
            self.look()

    def look(self) -> None:
        """Close what must not be kept any more."""
        now = self._now()
        servers = list(self._used)
        crowds, full = self._waited_for(servers), self._holds.without_room(servers)
        with self._lock:
            self._crowded |= crowds
            self._note_full(full)
            due = [kept for key in list(self._idle) for kept in self._due(key, now)]
            for server, used in list(self._used.items()):
                if self._is_draining or server in self._full or now > used + _USED_SECONDS:
                    del self._used[server]
            rest = [kept for stack in self._idle.values() for kept in stack]
        lost = [kept for kept in rest if now >= kept.since + LOOK_SECONDS and not _is_wanted(kept)]
        with self._lock:
            due += [kept for kept in lost if self._remove(kept)]
            # Of no other server would anybody notice that nobody waits there any more.
            self._crowded = crowds & self._used.keys()
        close_all(kept.connection for kept in due)
        for kept in due:
            kept.release()

    def _due(self, key: _Key, now: float) -> list[Kept]:
        """Take out what is kept of an image, but for what may stay; by the clock alone."""
        server, stack = key[0], self._idle[key]
        latest = stack[-1] if stack else None
        closes = self._is_draining or server in self._crowded or server in self._full
        next_look = now + LOOK_SECONDS
        stays = [
            kept
            for kept in stack
            if not closes
            and next_look <= kept.since + self.seconds
            and next_look <= kept.connection.opened + _MOST_AGE_SECONDS
            and (kept is latest or now < kept.since + LOOK_SECONDS)
        ]
        due = [kept for kept in stack if kept not in stays]
        self._count -= len(due)
        self._idle[key] = stays
        if not stays:
            del self._idle[key]
        return due

    def _remove(self, kept: Kept) -> bool:
        """Take out one; False where a request has it meanwhile."""
        stack = self._idle.get(kept.key, [])
        if kept not in stack:
            return False
        stack.remove(kept)
        self._count -= 1
        return True


def _name(kept: Kept) -> str:
    return kept.transfer.id if kept.transfer else ""


def _is_wanted(kept: Kept) -> bool:
    """Tell whether the transfer is what it was, and the socket is the server's."""
    named = NbdImage(kept.image.socket)  # wherever links lead now
    return (
        kept.hold is not None and kept.hold.is_current() and named.stamp() == kept.connection.server
    )
