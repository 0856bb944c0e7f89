# SPDX-License-Identifier: Apache-2.0
"""One connection to an NBD server: connecting, submitting, waiting, disconnecting.

The only importer of libnbd; its errors become ours here, once. Everything is asynchronous
underneath (nbd_aio_*(3)): that is what allows several requests in flight, and ``poll`` with
a timeout is what bounds a silent server. libnbd connects by itself: a descriptor with two
owners has handed out another image's bytes before.

A link is used by one thread at a time; only ``stopped`` is for another one.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import nbd

from imageserver.backends.nbd.failures import Stopped, TryAgain, TurnedAway, translated
from imageserver.backends.nbd.kind import MAX_SOCKET_PATH, NbdImage
from imageserver.core.errors import (
    NO_DESCRIPTOR,
    BackendError,
    BackendTimeout,
    Exhausted,
    ImageServerError,
)
from imageserver.core.extents import Reply
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Check, no_client

#: How long an orderly disconnect may take (NBD_CMD_DISC). A server that takes longer hangs.
DISCONNECT_SECONDS = 1.0
#: Between tries to connect to a server whose backlog is full.
_RETRY_SECONDS = 0.02
#: A server with room for one client may close a connection a moment before it has room again.
_TURNED_AWAY_SECONDS = 0.25
#: What libnbd says of a peer that closes or resets the connection.
_HUNG_UP = {0, errno.ECONNRESET, errno.EPIPE}
#: How soon ``stop``, or that the client has gone, is noticed while the server is silent.
_STOP_SECONDS = 0.1

#: NBD protocol, "Block size constraints": what a client may send to a server that says nothing.
_DEFAULT_MAXIMUM = 32 << 20


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a transfer uses a server: bytes per request, requests in flight, seconds of silence."""

    chunk_size: int
    queue_depth: int
    timeout: float


def connect(
    image: NbdImage,
    contexts: Sequence[str],
    seconds: float,
    tuning: Tuning,
    check: Check = no_client,
) -> "Link":
    """Connect to an export and negotiate, within ``seconds``.

    Raises:
        BackendError: the server refuses, or cannot be reached.
        BackendTimeout: the connection or its handshake takes too long.
        Exhausted: no descriptor is free.
    """
    deadline = time.monotonic() + seconds
    name = f"{image.socket} export {image.export!r}"
    while True:
        server = image.stamp() or ()
        try:
            handle = _handshake(image, name, contexts, deadline, check)
            return Link(handle, name, server, tuning, check)
        except TryAgain as exc:
            if time.monotonic() > deadline:
                raise BackendTimeout(f"{name}: the backlog of its socket is full") from exc
        except TurnedAway:
            if time.monotonic() > deadline - seconds + _TURNED_AWAY_SECONDS:
                raise
        time.sleep(_RETRY_SECONDS)
        check()


def _handshake(
    image: NbdImage,
    name: str,
    contexts: Sequence[str],
    deadline: float,
    check: Check,
) -> nbd.NBD:
    handle = nbd.NBD()
    try:
        if image.export:
            handle.set_export_name(image.export)
        # Buffers are only ever handed on after a read has filled them.
        handle.set_pread_initialize(False)
        for context in contexts:
            handle.add_meta_context(context)
        _connect_unix(handle, image.path)
        # Few calls: each gives the interpreter to another thread and has to win it back.
        while handle.aio_is_connecting():
            left = deadline - time.monotonic()
            if left <= 0:
                raise BackendTimeout(f"{name}: the handshake took too long")
            if handle.poll(_milliseconds(min(left, _STOP_SECONDS))) == 0:
                check()  # while the server is silent
        if not handle.aio_is_ready():
            raise BackendError(f"{name}: closed the connection during the handshake")
    except nbd.Error as exc:
        raise _refused(exc, handle, name) from exc.with_traceback(None)
    except OSError as exc:
        cls = Exhausted if exc.errno in NO_DESCRIPTOR else BackendError
        raise cls(f"{name}: {exc.strerror}") from exc.with_traceback(None)
    else:
        return handle
    finally:
        # A connection is closed when nothing refers to it, a traceback included: an error
        # that somebody keeps must not keep a place in the server's queue with it.
        del handle


def _connect_unix(handle: nbd.NBD, path: bytes) -> None:
    """Begin to connect, also where links have led to a path that no address takes (unix(7)).

    Raises:
        OSError: there is no socket at such a path.
    """
    if len(path) <= MAX_SOCKET_PATH:
        handle.aio_connect_unix(path)
        return
    socket = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        handle.aio_connect_unix(b"/proc/self/fd/%d" % socket)  # calls connect(2) at once
    finally:
        os.close(socket)


def _refused(exc: nbd.Error, handle: nbd.NBD, name: str) -> ImageServerError:
    """Return what a failed handshake is for us."""
    # EINVAL: libnbd was left waiting by EAGAIN, and cannot poll a socket that is nowhere.
    if exc.errnum == errno.EINVAL and handle.aio_is_connecting():
        return TryAgain(f"{name}: {exc}")
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


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


class Link:
    """A connected export."""

    def __init__(
        self, handle: nbd.NBD, name: str, server: tuple[int, ...], tuning: Tuning, check: Check
    ) -> None:
        self._handle = handle
        self.name = name
        #: Which server it is: the same socket, as it was bound.
        self.server = server
        self._is_closed = False
        self._stopped = False
        self._check = check
        #: A request that is quick is answered before its client is looked at.
        self._check_at = time.monotonic() + _STOP_SECONDS
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
        #: False while a write or zero may still be under way.
        self.settled = True
        #: The server completed nothing for the timeout: waiting again would only double that.
        self._is_silent = False

    @cached_property
    def info(self) -> ImageInfo:
        """What the export can do; asked when first needed, which a plain read never is."""
        multi_conn = bool(self._handle.can_multi_conn())
        return ImageInfo(
            size=self.size,
            read_only=bool(self._handle.is_read_only()),
            can_zero=bool(self._handle.can_zero()),
            can_flush=bool(self._handle.can_flush()),
            multi_conn=multi_conn,
            flushes_image=multi_conn,
        )

    def can_fast_zero(self) -> bool:
        """Tell whether ``zero`` may ask for ``fast``."""
        return bool(self._handle.can_fast_zero())

    def has_context(self, name: str) -> bool:
        """Tell whether the server agreed to a meta context."""
        return bool(name and self._handle.can_meta_context(name))

    # Submitting: each returns a cookie for ``wait``.

    def pread(self, view: memoryview, offset: int) -> int:
        """Ask for as many bytes as ``view`` has; it is filled once the request is complete."""
        # The view itself, no nbd.Buffer: libnbd 1.14 leaks a reference with each of those.
        return self._submit(self._handle.aio_pread, view, offset)

    def pwrite(self, view: memoryview, offset: int) -> int:
        """Send bytes; ``view`` must not change until the request is complete."""
        self.settled = False
        return self._submit(self._handle.aio_pwrite, view, offset)

    def zero(self, offset: int, length: int, *, fast: bool) -> int:
        """Zero a range; ``fast``: or fail with ``NotSupported`` where that means writing."""
        self.settled = False
        flags = nbd.CMD_FLAG_FAST_ZERO if fast else 0
        return self._submit(self._handle.aio_zero, length, offset, flags=flags)

    def flush(self) -> int:
        """Bring all completed writes to stable storage (NBD_CMD_FLUSH)."""
        return self._submit(self._handle.aio_flush)

    def block_status(self, offset: int, length: int, replies: dict[str, Reply]) -> int:
        """Ask for block status; ``replies`` has it by context once the request is complete."""

        def keep(context: str, _offset: int, entries: list[int], _error: object) -> int:
            replies[context] = Reply(entries[0::2], entries[1::2])
            return 0

        return self._submit(self._handle.aio_block_status, length, offset, keep)

    def _submit(self, command: Callable[..., int], *args: object, **kwargs: object) -> int:
        try:
            return command(*args, **kwargs)
        except nbd.Error as exc:
            raise translated(exc, self.name) from exc.with_traceback(None)

    # Waiting

    def wait(self, cookie: int) -> None:
        """Wait until a request is complete; the clock starts anew with each call.

        Raises:
            BackendTimeout: the server completed nothing for the timeout.
            BackendError, NoSpace: it failed the request, or the connection broke.
            ClientGone: nobody waits for the answer any more.
        """
        now = time.monotonic()
        deadline = now + self.timeout
        while not self.is_complete(cookie):
            if now >= self._check_at:
                self._check_at = now + _STOP_SECONDS
                self._check()
            self._poll(deadline)
            now = time.monotonic()

    def is_complete(self, cookie: int) -> bool:
        """Tell whether a request is complete; raises what it failed with."""
        try:
            return bool(self._handle.aio_command_completed(cookie))
        except nbd.Error as exc:
            raise translated(exc, self.name) from exc.with_traceback(None)

    def settle(self) -> None:
        """Wait for every write in flight, so that none lands after the image is given back."""
        if self.settled or self._is_silent:
            return
        deadline = time.monotonic() + self.timeout
        try:
            while self._handle.aio_in_flight():
                self._poll(deadline)
        except (ImageServerError, nbd.Error):
            return  # dead or hanging: the image's lock stays marked
        self.settled = True

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Make the thread that waits on this link give up, with ``Stopped``. From another one."""
        self._stopped = True
        try:
            yield
        finally:
            self._stopped = False

    def stop(self) -> None:
        """Give the server up, from any thread: as if it had been silent for too long."""
        self._is_silent = True

    def _poll(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if self._stopped or self._is_silent:
            raise Stopped(self.name)
        if left <= 0:
            self._is_silent = True
            raise BackendTimeout(f"{self.name}: completed nothing in {self.timeout:g} s")
        try:
            self._handle.poll(_milliseconds(min(left, _STOP_SECONDS)))
        except nbd.Error as exc:
            raise translated(exc, self.name) from exc.with_traceback(None)

    def close(self) -> None:
        """Disconnect, and wait within bounds until the server has closed the connection.

        So that the next client of a server with room for one finds room, and no server ever
        sees more of us than the limits allow. Never fails, may be called twice.
        """
        if self._is_closed:
            return
        self._is_closed = True
        handle = self._handle
        del self._handle  # the connection ends with the last reference
        if self._is_silent:
            return
        deadline = time.monotonic() + DISCONNECT_SECONDS
        with contextlib.suppress(nbd.Error):  # it is gone: that is what we want
            handle.aio_disconnect()
            while not handle.aio_is_closed():
                left = deadline - time.monotonic()
                if left <= 0 or handle.poll(_milliseconds(left)) == 0:
                    break
