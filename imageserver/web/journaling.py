# SPDX-License-Identifier: Apache-2.0
"""What becomes of a request, told to the journals once: when its answer has ended.

A ``Trace`` travels with the request and gathers what others find out about it: the id, the
operation, the range, what went wrong. The middleware ends it; where an answer is streamed,
the body does, with its last piece or without it.
"""

import re
import secrets
import time
from collections.abc import Callable, Sequence

import falcon

from imageserver.core.entry import Entry
from imageserver.core.errors import ClientGone
from imageserver.core.ports import Journal
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer
from imageserver.images.sessions import Need, Session

#: An id that a client or proxy has chosen: what is safe in a header and in a log line.
_REQUEST_ID = re.compile(r"[0-9A-Za-z._:/+=@-]{1,128}")
#: As much of an unknown id, or of what went wrong, as is worth a log line.
_SHOWN = 256


class Trace:
    """What is known of a request so far."""

    def __init__(
        self,
        journals: Sequence[Journal],
        req: falcon.Request,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = _request_id(req.get_header("X-Request-Id"))
        self._journals = journals
        self._method, self._client = req.method, req.remote_addr
        self._now = now
        self._began = now()
        self._status: int | None = None
        self._id = self._backend = ""
        self._need: Need | None = None
        self._session: Session | None = None
        self._error: BaseException | None = None
        self._sent = 0
        self._has_ended = False

    def asks_for(self, transfer_id: str) -> None:
        """Note the id, known or not."""
        self._id = transfer_id[:_SHOWN]

    def found(self, transfer: Transfer) -> None:
        """Note the transfer."""
        self._backend = transfer.image.kind.name

    def needs(self, need: Need) -> None:
        """Note the operation that a session is to be opened for."""
        self._need = need

    def has(self, session: Session) -> None:
        """Note the session, which knows how far the operation comes."""
        self._session = session

    def sent(self, count: int) -> None:
        """Note that so many more bytes of a streamed body have been taken by the server."""
        self._sent += count

    def failed(self, error: BaseException) -> None:
        """Note what went wrong; the first error counts."""
        self._error = self._error or error

    def answered(self, status: int) -> None:
        """Note the answer's status; 0 for none."""
        self._status = status

    def end(self) -> None:
        """Tell the journals, once; not before the answer is known, which a body may be closed."""
        if self._has_ended or self._status is None:
            return
        self._has_ended = True
        entry = self._entry(self._status)
        for journal in self._journals:
            journal.finished(entry)

    def _entry(self, status: int) -> Entry:
        session, need, error = self._session, self._need, self._error
        done = session.done if session else 0
        if need and need.kind is Kind.READ:
            done = self._sent  # the session runs a piece ahead
        # A body that nobody iterates any more: the client has gone.
        name = ClientGone if isinstance(error, GeneratorExit) else type(error)
        return Entry(
            method=self._method,
            transfer=self._id,
            operation=need.operation if need else self._method.lower(),
            backend=self._backend,
            span=session.span if session else None,
            done=done,
            status=status,
            error=name.__name__ if error else "",
            detail=str(error)[:_SHOWN] if error else "",
            seconds=self._now() - self._began,
            client=self._client,
            request=self.request,
        )


class JournalMiddleware:
    """Begins a trace with every request, and ends it; the outermost middleware."""

    def __init__(self, journals: Sequence[Journal]) -> None:
        self._journals = journals

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Begin a trace, and name the request to the client."""
        trace = req.context.trace = Trace(self._journals, req)
        resp.set_header("X-Request-Id", trace.request)

    def process_response(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        _resource: object,
        _req_succeeded: bool,  # noqa: FBT001 - Falcon's signature
    ) -> None:
        """End the trace of an answer that is whole; a streamed one ends with its body."""
        trace = trace_of(req)
        trace.answered(resp.status_code)
        if resp.stream is None:
            trace.end()


def trace_of(req: falcon.Request) -> Trace:
    """Return a request's trace."""
    trace: Trace = req.context.trace
    return trace


def _request_id(given: str | None) -> str:
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(8)
