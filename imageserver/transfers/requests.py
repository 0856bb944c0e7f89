# SPDX-License-Identifier: Apache-2.0
"""The account of one request, from its head to its log line.

Whoever learns something of a request notes it here, once: the id, the transfer, the operation,
how many bytes have moved, what went wrong, the status. Who listens:

    the slot, the meter     told of each piece: ``progress``
    a tracked use           looks four times a second, and at the end: ``tracking.py``
    the journals            told once, with all of it: ``end``
    ``underway``            has the request from ``begin`` to ``end``
"""

import time
from collections.abc import Callable, MutableSet, Sequence

from imageserver.core.entry import Entry
from imageserver.core.errors import ClientGone
from imageserver.core.ports import Backend, Slot
from imageserver.core.ranges import Span
from imageserver.core.reports import Journal, Underway
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer

#: As much of an unknown id, or of what went wrong, as is worth a log line.
_SHOWN = 256


def _nothing(*_: object) -> None:
    pass


def _never() -> bool:
    return False


class Request:
    """What is known of one request so far. One thread writes it; ``cut`` may come from another."""

    def __init__(  # noqa: PLR0913 - what the server knows of a request
        self,
        method: str,
        client: str,
        name: str,
        journals: Sequence[Journal] = (),
        *,
        is_gone: Callable[[], bool] = _never,
        disconnect: Callable[[], None] = _nothing,
        now: Callable[[], float] = time.monotonic,
        underway: MutableSet[Underway] | None = None,
    ) -> None:
        """``name``: its ``X-Request-Id``. ``is_gone`` tells whether the client has gone.

        ``disconnect`` shuts the client's connection down.
        """
        self.client, self.name = client, name
        #: What of the image the operation is about, and how many bytes of that are done.
        self.span: Span | None = None
        self.done = 0
        #: How many bytes of a streamed body the server has taken.
        self.sent = 0
        self.kind: Kind | None = None
        #: What went wrong while the request had a slot, for those who ask for the transfer.
        self.image_error: str | None = None
        self._method = method
        self._journals = journals
        self._is_gone, self._disconnect = is_gone, disconnect
        self._now = now
        self._underway = underway
        self._began = now()
        self._id = self._backend_name = ""
        self._operation = method.lower()
        self._error: BaseException | None = None
        self._status: int | None = None
        self._has_slot = self._has_ended = self._is_cut = False
        self._expected = 0
        self._backend: Backend | None = None
        self._show: Callable[[int, int], None] = _nothing
        self._count: Callable[[int], None] = _nothing
        self._leave: Callable[[], None] = _nothing

    # The transfer

    @property
    def transfer_id(self) -> str:
        """The id that was asked for."""
        return self._id

    @property
    def operation(self) -> str:
        """What a session was asked for, else the method in lower case."""
        return self._operation

    def asks_for(self, transfer_id: str) -> None:
        """Note the id, known or not."""
        self._id = transfer_id[:_SHOWN]

    def found(self, transfer: Transfer, leave: Callable[[], None] = _nothing) -> None:
        """Note the transfer; ``leave`` ends the request's use of it, and may be called twice."""
        self._backend_name = transfer.image.kind.name
        self._leave = leave

    def leave(self) -> None:
        """End the use of the transfer."""
        self._leave()

    def check(self) -> None:
        """Raise ``ClientGone`` where nobody waits for the answer any more; from any thread."""
        if self._is_cut or self._is_gone():
            raise ClientGone

    def cut(self) -> None:
        """Cut the client off, and make whoever waits for the back end fail; from another thread."""
        self._is_cut = True
        self._disconnect()
        if self._backend:
            self._backend.stop()

    # The image

    def needs(self, operation: str, kind: Kind) -> None:
        """Note the operation that a session is to be opened for."""
        self._operation, self.kind = operation, kind

    def holds(self, slot: Slot) -> None:
        """Note the slot: from now on what goes wrong is an error of the transfer's."""
        self._has_slot, self._show = True, slot.progress

    def uses(self, backend: Backend) -> None:
        """Name the back end that ``cut`` stops."""
        self._backend = backend
        if self._is_cut:  # ``cut`` may have come before it could see the back end
            backend.stop()

    def counts(self, count: Callable[[int], None]) -> None:
        """Name who counts bytes as they move."""
        self._count = count

    def begin(self, span: Span) -> None:
        """Note what of the image the operation is about."""
        self.span, self._expected = span, span.length
        self._show(0, self._expected)
        if self._underway is not None:
            self._underway.add(self)

    def progress(self, done: int) -> None:
        """Note how many bytes of the span are done, and show them to operators."""
        self._count(done - self.done)
        self.done = done
        self._show(done, self._expected)

    # The end

    def failed(self, error: BaseException) -> None:
        """Note what went wrong; the first error counts."""
        if self._error is None:
            # A generator that nobody iterates any more: the client has gone.
            self._error = ClientGone() if isinstance(error, GeneratorExit) else error
            if self._has_slot:
                self.image_error = f"{type(self._error).__name__}: {self._error}".removesuffix(": ")

    def answered(self, status: int) -> None:
        """Note the answer's status; 0 for none."""
        self._status = status

    def end(self) -> None:
        """Tell the journals, once; not before the answer is known, which a body may be closed."""
        if self._has_ended or self._status is None:
            return
        self._has_ended = True
        if self._underway is not None:
            self._underway.discard(self)
        entry = self._entry(self._status)
        for journal in self._journals:
            journal.finished(entry)

    def _entry(self, status: int) -> Entry:
        error = self._error
        return Entry(
            method=self._method,
            transfer=self._id,
            operation=self._operation,
            backend=self._backend_name,
            span=self.span,
            # Of a read, the back end runs a piece ahead of the client.
            done=self.sent if self._operation in {"read", "qcow2"} else self.done,
            status=status,
            error=type(error).__name__ if error else "",
            detail=str(error)[:_SHOWN] if error else "",
            seconds=self._now() - self._began,
            client=self.client,
            request=self.name,
        )
