# SPDX-License-Identifier: Apache-2.0
"""A connection to an NBD server: connecting, negotiating, disconnecting.

Everything is asynchronous underneath (nbd_aio_*(3)), so that each wait has a bound. libnbd
connects by itself: a descriptor with two owners has handed out another image's bytes before.

What the server has said of the export is asked once for all requests that a connection serves
(``pool.py``).
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import nbd

from imageserver.backends.descriptors import close_fd
from imageserver.backends.nbd.busypoll import BusyPoll
from imageserver.backends.nbd.failures import TryAgain, TurnedAway, translated
from imageserver.backends.nbd.kind import NbdImage, stamp_of
from imageserver.core.errors import (
    NO_DESCRIPTOR,
    BackendError,
    BackendTimeout,
    Exhausted,
    ImageServerError,
)
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Check, no_client

#: How long an orderly disconnect may take (NBD_CMD_DISC). A server that takes longer hangs.
DISCONNECT_SECONDS = 1.0
#: Between tries to connect to a server whose backlog is full.
_RETRY_SECONDS = 0.02
#: A server with room for one client may close a connection a moment before it has room again.
TURNED_AWAY_SECONDS = 0.25
#: What libnbd says of a peer that closes or resets the connection.
_HUNG_UP = {0, errno.ECONNRESET, errno.EPIPE}
#: How soon it is noticed, while the server is silent, that the client has gone; and the first time,
#: that the server may have no room.
_STOP_SECONDS = 0.1
_WAITING_SECONDS = 0.05

#: NBD protocol, "Block size constraints": what a client may send to a server that says nothing.
_DEFAULT_MAXIMUM = 32 << 20


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a transfer uses a server: bytes per request, requests in flight, seconds of silence."""

    chunk_size: int
    queue_depth: int
    timeout: float


class Connection:
    """A connected export: libnbd's handle, and what the server has said of the export."""

    def __init__(
        self,
        handle: nbd.NBD,
        name: str,
        server: tuple[int, ...],
        tuning: Tuning,
        contexts: Collection[str] = (),
    ) -> None:
        self.handle = handle
        self.name = name
        #: Which server it is: the same socket, as it was bound.
        self.server = server
        #: The meta contexts that were asked for, whether or not the server has them.
        self.contexts = frozenset(contexts)
        self.opened = time.monotonic()
        self.busy_poll = BusyPoll()
        self.timeout = tuning.timeout
        self.depth = tuning.queue_depth
        self.size = _size(handle, name)
        #: Requests must start and end at multiples of this.
        self.align: int = max(1, handle.get_block_size(nbd.SIZE_MINIMUM))
        #: The most bytes a read or write request may have.
        self.maximum: int = handle.get_block_size(nbd.SIZE_MAXIMUM) or _DEFAULT_MAXIMUM
        #: Bytes per read or write request: what is configured, within what the server takes.
        self.chunk: int = max(
            self.align, min(tuning.chunk_size, self.maximum) // self.align * self.align
        )

    @cached_property
    def info(self) -> ImageInfo:
        """What the export can do; asked when first needed."""
        multi_conn = self.multi_conn
        return ImageInfo(
            size=self.size,
            read_only=bool(self.handle.is_read_only()),
            can_zero=bool(self.handle.can_zero()),
            can_flush=bool(self.handle.can_flush()),
            multi_conn=multi_conn,
            flushes_image=multi_conn,
            identity=self.server,
        )

    @cached_property
    def multi_conn(self) -> bool:
        """Whether the server takes several clients, and a flush covers them all."""
        return bool(self.handle.can_multi_conn())

    @cached_property
    def can_fast_zero(self) -> bool:
        """Whether the server refuses to zero at once where it would have to write."""
        return bool(self.handle.can_fast_zero())

    def is_alive(self) -> bool:
        """Tell whether the server has kept a connection on which nothing is under way."""
        try:
            return self.handle.poll(0) == 0  # else it has hung up, or speaks unasked
        except nbd.Error:
            return False

    @property
    def is_broken(self) -> bool:
        """Whether requests without an answer will get none, though the server may have them."""
        return bool(self.handle.aio_is_dead() or self.handle.aio_is_closed())

    def close(self) -> None:
        """Disconnect, and wait within bounds until the server has closed the connection.

        So that the next client of a server with room for one finds room, and no server ever
        sees more of us than the limits allow. Never fails, may be called twice.
        """
        close_all([self])

    def drop(self) -> None:
        """Close without a word to the server, and without waiting for it."""
        self._let_go()

    def _let_go(self) -> nbd.NBD | None:
        """Return the handle, once: the connection ends with the last reference to it."""
        handle: nbd.NBD | None = self.__dict__.pop("handle", None)
        return handle


def close_all(connections: Iterable[Connection]) -> None:
    """Disconnect several, and wait for all of them together: see ``Connection.close``."""
    released = (connection._let_go() for connection in connections)  # noqa: SLF001 - ours
    handles = [handle for handle in released if handle is not None]
    deadline = time.monotonic() + DISCONNECT_SECONDS
    for handle in handles:
        with contextlib.suppress(nbd.Error):  # it is gone: that is what we want
            handle.aio_disconnect()
    for handle in handles:
        with contextlib.suppress(nbd.Error):
            while not handle.aio_is_closed():
                left = deadline - time.monotonic()
                if left <= 0 or handle.poll(milliseconds(left)) == 0:
                    break


@dataclass(frozen=True, slots=True)
class Attempt:
    """How to connect: what to ask for, and for how long.

    ``waits`` is called with the server when it may have no room for us, ``is_turned_away`` when it
    has hung up on us; for ``turned_away_seconds`` it is tried again.
    """

    contexts: Sequence[str]
    seconds: float
    check: Check = no_client
    waits: Callable[[tuple[int, ...]], None] = lambda _: None
    is_turned_away: Callable[[tuple[int, ...]], None] = lambda _: None
    turned_away_seconds: float = TURNED_AWAY_SECONDS


def connect(image: NbdImage, attempt: Attempt, tuning: Tuning) -> Connection:
    """Connect to an export and negotiate.

    Raises:
        BackendError: the server refuses, or cannot be reached.
        BackendTimeout: the connection or its handshake takes too long.
        Exhausted: no descriptor is free.
    """
    began = time.monotonic()
    deadline = began + attempt.seconds
    name = f"{image.socket} export {image.export!r}"
    while True:
        server = image.stamp() or ()
        try:
            handle = _handshake(image, name, server, attempt, deadline)
        except TryAgain as exc:
            if time.monotonic() > deadline:
                raise BackendTimeout(f"{name}: {exc}") from exc
            attempt.waits(server)
        except TurnedAway:
            if time.monotonic() > min(deadline, began + attempt.turned_away_seconds):
                raise
            attempt.is_turned_away(server)
        else:
            return Connection(handle, name, server, tuning, attempt.contexts)
        time.sleep(_RETRY_SECONDS)
        attempt.check()


def _handshake(
    image: NbdImage, name: str, server: tuple[int, ...], attempt: Attempt, deadline: float
) -> nbd.NBD:
    handle = nbd.NBD()
    try:
        if image.export:
            handle.set_export_name(image.export)
        # Buffers are only ever handed on after a read has filled them.
        handle.set_pread_initialize(False)
        for context in attempt.contexts:
            handle.add_meta_context(context)
        _connect_unix(handle, image, server)
        _negotiate(handle, name, server, attempt, deadline)
        if not handle.aio_is_ready():
            raise BackendError(f"{name}: closed the connection during the handshake")
        _size(handle, name)  # is refused here, where what refers to the connection ends
    except nbd.Error as exc:
        raise _refused(exc, handle, name) from exc.with_traceback(None)
    except OSError as exc:
        raise no_connection(name, exc) from exc.with_traceback(None)
    except ImageServerError as exc:
        raise exc.with_traceback(None)  # noqa: B904 - its frames refer to the connection
    else:
        return handle
    finally:
        # A connection is closed when nothing refers to it, a traceback included: an error
        # that somebody keeps must not keep a place in the server's queue with it.
        del handle


def no_connection(name: str, exc: OSError) -> ImageServerError:
    """Return what it is that there is no way to a server's socket, in the words of libnbd."""
    cls = Exhausted if exc.errno in NO_DESCRIPTOR else BackendError
    code = errno.errorcode.get(exc.errno or 0, "?")
    return cls(f"{name}: connect: {exc.strerror} ({code})")


def _negotiate(
    handle: nbd.NBD, name: str, server: tuple[int, ...], attempt: Attempt, deadline: float
) -> None:
    # Few calls: each gives the interpreter to another thread and has to win it back.
    patience = _WAITING_SECONDS
    while handle.aio_is_connecting():
        left = deadline - time.monotonic()
        if left <= 0:
            raise BackendTimeout(f"{name}: the handshake took too long")
        if handle.poll(milliseconds(min(left, patience))) == 0:  # the server is silent
            attempt.waits(server)
            if patience == _STOP_SECONDS:
                attempt.check()
            patience = _STOP_SECONDS


def _connect_unix(handle: nbd.NBD, image: NbdImage, server: tuple[int, ...]) -> None:
    """Begin to connect to the very socket that ``server`` names, wherever its path leads by now.

    Also where links have led to a path that no address takes (unix(7)).

    Raises:
        OSError: there is no socket at such a path.
        TryAgain: there is another one.
        BackendError: the image is pinned, and links lead elsewhere now.
    """
    socket = os.open(image.path, os.O_PATH | os.O_CLOEXEC)
    try:
        if stamp_of(os.fstat(socket)) != server:
            raise TryAgain(f"{image.socket} has been moved")
        if image.at is not None:
            _require_place(socket, image)
        handle.aio_connect_unix(b"/proc/self/fd/%d" % socket)  # calls connect(2) at once
    finally:
        close_fd(socket)


def _require_place(socket: int, image: NbdImage) -> None:
    """Prove that an opened socket is where the image was pinned: that is what is locked."""
    place = os.readlink(b"/proc/self/fd/%d" % socket)
    if place.endswith(b" (deleted)"):
        raise TryAgain(f"{image.socket} has been removed")
    if place != image.at and place.startswith(b"/"):  # else the kernel cannot say
        raise BackendError(f"{image.socket} has been moved, or links to it lead elsewhere now")


def _refused(exc: nbd.Error, handle: nbd.NBD, name: str) -> ImageServerError:
    """Return what a failed handshake is for us."""
    # EINVAL: libnbd was left waiting by EAGAIN, and cannot poll a socket that is nowhere.
    if exc.errnum == errno.EINVAL and handle.aio_is_connecting():
        return TryAgain("the backlog of its socket is full")
    if exc.errnum in _HUNG_UP:
        return TurnedAway(f"{name}: {exc}")
    return translated(exc, name)


def _size(handle: nbd.NBD, name: str) -> int:
    """Return the export's size in bytes; libnbd shows the 64 bits of the wire as a signed number.

    Raises:
        BackendError: it is 2^63 or more, which no offset reaches (off_t, NBD protocol).
    """
    size: int = -1
    with contextlib.suppress(nbd.Error):  # 2^64 - 1, which looks like a failure
        size = handle.get_size()
    if size < 0:
        raise BackendError(f"{name}: announces a size of 2^63 bytes or more")
    return size


def milliseconds(seconds: float) -> int:
    """Return what ``poll`` takes for a wait of ``seconds``: at least one."""
    return max(1, int(seconds * 1000))
