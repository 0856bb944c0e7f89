# SPDX-License-Identifier: Apache-2.0
"""A ring of buffers between two threads: one at the client's socket, one at the image.

    client's side --filled--> image's side        (a write; a read goes the other way round)
         ^---------empty------------'

Both release the interpreter while they copy, so receiving and writing overlap. The ring's
few buffers are what keeps one side from running away from the other.

A ring leaves its buffers to the next one: fresh memory costs a page fault every 4 KiB, which
is more than all else that a transfer of some MiB does.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from queue import Empty, SimpleQueue
from typing import Self

from imageserver.backends.descriptors import close_fd
from imageserver.core.errors import Exhausted
from imageserver.core.sources import Source

#: Most bytes that a worker keeps for its next transfers.
_SPARE_BYTES = 8 << 20
#: Buffers that nobody uses, with their last owners.
_spare: deque[tuple[object, bytearray]] = deque()


def take_buffer(size: int, owner: object) -> bytearray:
    """Return a buffer of ``size`` bytes. ``owner`` is the image, by what names it.

    Of what another image has left in it, nothing stays. A read fills it; but for that it is the
    other side that is trusted.
    """
    try:
        last, buffer = _spare.pop()
    except IndexError:
        return bytearray(size)
    if len(buffer) != size:
        return bytearray(size)
    if last != owner:
        buffer[:] = bytes(size)
    return buffer


def leave_buffer(buffer: bytearray, owner: object) -> None:
    """Leave a buffer to which nobody writes any more to the next transfer."""
    if (len(_spare) + 1) * len(buffer) <= _SPARE_BYTES:
        _spare.append((owner, buffer))


class Ring:
    """At most ``count`` buffers of ``size`` bytes, made when they are needed."""

    def __init__(self, count: int, size: int, owner: object) -> None:
        """``owner``: see ``take_buffer``."""
        self._size = size
        self._owner = owner
        self._unmade = count
        self._is_closed = False
        self._closed: int | None = None
        self._empty: SimpleQueue[bytearray | None] = SimpleQueue()

    def take(self, *, wait: bool) -> bytearray | None:
        """Return an empty buffer; None where there is none, or after ``close``. For one thread."""
        try:
            buffer = self._empty.get(block=wait and not self._unmade)
        except Empty:
            if not self._unmade:
                return None
            self._unmade -= 1
            return take_buffer(self._size, self._owner)
        if buffer is None:
            self._empty.put(None)  # closed for good: whoever asks again must not wait
        return buffer

    def give(self, buffer: bytearray) -> None:
        """Make a buffer available again."""
        self._empty.put(buffer)

    def close(self) -> None:
        """Wake whoever waits for a buffer, or for the client: there will be none."""
        self._is_closed = True
        self._empty.put(None)
        if self._closed is not None:
            os.eventfd_write(self._closed, 1)

    def fileno(self) -> int:
        """Return a descriptor that is readable once the ring is closed; for ``Source.readinto``.

        Raises:
            Exhausted: there is none.
        """
        if self._closed is None:
            try:
                self._closed = os.eventfd(0, os.EFD_CLOEXEC)
            except OSError as exc:
                raise Exhausted(f"eventfd: {exc.strerror}") from exc
            if self._is_closed:
                os.eventfd_write(self._closed, 1)
        return self._closed

    @property
    def is_closed(self) -> bool:
        """Tell whether ``close`` was called."""
        return self._is_closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Leave the empty buffers; one that was not given back may still be written to."""
        closed, self._closed = self._closed, None
        if closed is not None:
            close_fd(closed)
        with suppress(Empty):
            while True:
                if buffer := self._empty.get_nowait():
                    leave_buffer(buffer, self._owner)


class Side(threading.Thread):
    """The image's side on a thread of its own, for as long as the ``with`` block runs."""

    def __init__(
        self,
        work: Callable[[], None],
        ended: Callable[[], None],
        stopping: Callable[[], AbstractContextManager[object]],
    ) -> None:
        """``ended`` tells the client's side that there will be no more.

        ``stopping`` is entered while the thread is waited for before its work is done.
        """
        super().__init__(name="image", daemon=True)
        self._work = work
        self._ended = ended
        self._stopping = stopping
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Do the work; what it fails with is raised by ``finish``."""
        try:
            self._work()
        except BaseException as exc:  # noqa: BLE001 - raised again by the other thread
            self._failure = exc
        finally:
            self._ended()

    def finish(self) -> None:
        """Wait for the end of the work; raise what it failed with."""
        self.join()
        if self._failure:
            raise self._failure

    def __enter__(self) -> Self:
        """Start the thread.

        Raises:
            Exhausted: the system has none.
        """
        try:
            self.start()
        except RuntimeError as exc:
            raise Exhausted(str(exc)) from exc
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.is_alive():
            with self._stopping():
                self.join()


def fill(source: Source, view: memoryview, ring: Ring | None = None) -> int:
    """Fill ``view`` from ``source``; return how much there was before it or the ring ended."""
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled:], ring)
        if count == 0:
            break
        filled += count
    return filled
