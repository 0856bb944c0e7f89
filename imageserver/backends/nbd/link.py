# SPDX-License-Identifier: Apache-2.0
"""One request's use of a connection to an NBD server: submitting, waiting, settling.

libnbd's errors become ours here, once. Everything is asynchronous underneath (nbd_aio_*(3)): that
is what allows several requests in flight, and ``poll`` with a timeout is what bounds a silent
server.

A link is used by one thread at a time; only ``stopped`` and ``stop`` are for another one. The next
request of the same connection has a link of its own, so that a late ``stop`` meets nobody.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import nbd

from imageserver.backends.nbd.connection import Connection, milliseconds
from imageserver.backends.nbd.failures import NotSupported, Stopped, translated
from imageserver.core.errors import BackendTimeout, ImageServerError
from imageserver.core.extents import Reply
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Check, no_client

#: How soon ``stop``, or that the client has gone, is noticed while the server is silent.
_STOP_SECONDS = 0.1
#: For how long two requests that have met are not taken to be alone.
_ALONE_SECONDS = 0.05
#: The links that requests of this process have now.
_in_use: set["Link"] = set()


class Link:
    """A connected export."""

    #: When a request began last while another of this process had a link.
    _met_at = -_ALONE_SECONDS

    def __init__(self, connection: Connection, check: Check = no_client) -> None:
        self.connection = connection
        self._handle = connection.handle
        self.name, self.server = connection.name, connection.server
        self.size, self.align = connection.size, connection.align
        self.chunk, self.maximum = connection.chunk, connection.maximum
        self.depth, self.timeout = connection.depth, connection.timeout
        self._check = check
        now = time.monotonic()
        #: A request that is quick is answered before its client is looked at.
        self._check_at = now + _STOP_SECONDS
        self._stopped = False
        #: False while a write or zero may still be under way.
        self.settled = True
        #: The server completed nothing for the timeout: waiting again would only double that.
        self._is_silent = False
        self._has_failed = False
        #: Requests that nobody has seen complete.
        self._pending = 0
        _in_use.add(self)
        if len(_in_use) > 1:
            Link._met_at = now
        #: No other request of this process has had a link at the same time, or a moment ago: the
        #: cores are free.
        self.is_alone = now > Link._met_at + _ALONE_SECONDS

    @property
    def info(self) -> ImageInfo:
        """What the export can do."""
        return self.connection.info

    @property
    def is_clean(self) -> bool:
        """Tell whether all that was asked for was done, so that another request may follow."""
        return self.settled and not (self._pending or self._has_failed or self._is_silent)

    def can_fast_zero(self) -> bool:
        """Tell whether ``zero`` may ask for ``fast``."""
        return self.connection.can_fast_zero

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

    def zero(self, offset: int, length: int, *, fast: bool, hole: bool = True) -> int:
        """Zero a range; ``fast``: or fail with ``NotSupported`` where that means writing.

        ``hole``: it need not stay allocated.
        """
        self.settled = False
        flags = (nbd.CMD_FLAG_FAST_ZERO if fast else 0) | (0 if hole else nbd.CMD_FLAG_NO_HOLE)
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
            cookie = command(*args, **kwargs)
        except nbd.Error as exc:
            raise self._failed(exc) from exc.with_traceback(None)
        self._pending += 1
        return cookie

    def _failed(self, exc: nbd.Error) -> ImageServerError:
        error = translated(exc, self.name)
        if not isinstance(error, NotSupported):  # which is an answer
            self._has_failed = True
        return error

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
            is_complete = bool(self._handle.aio_command_completed(cookie))
        except nbd.Error as exc:
            self._pending -= 1
            raise self._failed(exc) from exc.with_traceback(None)
        self._pending -= is_complete
        return is_complete

    def settle(self) -> None:
        """Wait for every write in flight, so that none lands after the image is given back."""
        if self.settled or self._is_silent:
            return
        deadline = time.monotonic() + self.timeout
        try:
            while self._handle.aio_in_flight():
                self._poll(deadline)
        except (ImageServerError, nbd.Error):
            return  # broken or hanging: writes may still land, and the next one waits for them
        # Where libnbd gives a connection up, nothing is in flight, though nothing was answered.
        self.settled = not self.connection.is_broken

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
            longest = milliseconds(min(left, _STOP_SECONDS))
            if self.is_alone and len(_in_use) == 1:  # nobody has come since
                self.connection.busy_poll.wait(self._handle.poll, longest)
            else:
                self._handle.poll(longest)
        except nbd.Error as exc:
            raise self._failed(exc) from exc.with_traceback(None)

    def let_go(self) -> Connection:
        """End this use of the connection, which another request may have. May be called twice."""
        _in_use.discard(self)
        self.__dict__.pop("_handle", None)  # a connection ends with the last reference to it
        return self.connection

    def close(self) -> None:
        """End the connection, too. Never fails, may be called twice."""
        connection = self.let_go()
        if self._is_silent:
            connection.drop()
        else:
            connection.close()
