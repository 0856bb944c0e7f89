# SPDX-License-Identifier: Apache-2.0
"""The one table from errors to answers (docs/api.md), and how an answer looks.

What a client is told stands here; the error's own text, with its paths and library
messages, goes to the log.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import falcon

from imageserver.core import errors
from imageserver.core.slots import Kind
from imageserver.images.probing import WouldWait
from imageserver.web.answers import set_json
from imageserver.web.requests import request_of

log = logging.getLogger(__name__)

#: Locks and slots are held for as long as a transfer takes; asking again costs little.
_RETRY_AFTER = {"Retry-After": "1"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A status, the message for the client, further headers and fields beside the message."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)
    fields: dict[str, int] = field(default_factory=dict)


_NO_SLOT = {
    Kind.READ: "too many parallel reads",
    Kind.WRITE: "too many parallel writes",
    Kind.OTHER: "server busy",
    Kind.WORKER: "server busy",
}

#: Every leaf that has an answer; the nearest class in an error's ancestry counts.
TABLE: dict[type[errors.ImageServerError], Callable[[Any], Answer]] = {
    errors.NotFound: lambda _: Answer(404, "not found"),
    errors.UnknownImage: lambda _: Answer(404, "unknown image_id"),
    errors.Unauthorized: lambda _: Answer(
        401, "missing or wrong token", {"WWW-Authenticate": "Bearer"}
    ),
    errors.BadRequest: lambda e: Answer(400, e.message),
    errors.UnsupportedMediaType: lambda e: Answer(415, e.message),
    errors.MethodNotAllowed: lambda e: Answer(
        405, "method not allowed", {"Allow": ", ".join(e.allowed)}
    ),
    errors.PreconditionFailed: lambda _: Answer(412, "precondition failed"),
    errors.RangeOutsideImage: lambda e: Answer(
        416, "range not satisfiable", {"Content-Range": f"bytes */{e.size}"}
    ),
    errors.ImageBusy: lambda _: Answer(409, "image busy", _RETRY_AFTER),
    errors.NoSlot: lambda e: Answer(503, _NO_SLOT[e.kind], _RETRY_AFTER),
    errors.NoImageSlot: lambda e: Answer(503, _NO_SLOT[e.kind], _RETRY_AFTER),
    errors.StateUnavailable: lambda _: Answer(503, "server state unavailable", _RETRY_AFTER),
    errors.Exhausted: lambda _: Answer(503, "server busy", _RETRY_AFTER),
    errors.StateFull: lambda _: Answer(507, "no space left", _RETRY_AFTER),
    errors.ShortBody: lambda e: Answer(400, f"request body ended early at {e.received} bytes"),
    errors.DigestMismatch: lambda e: Answer(400, str(e), fields={"bytes_written": e.written}),
    errors.NoSpace: lambda _: Answer(507, "no space left"),
    errors.FileAccessError: lambda _: Answer(500, "failed to access file"),
    errors.BackendError: lambda _: Answer(500, "backend error"),
    errors.BackendTimeout: lambda _: Answer(504, "backend timeout"),
    errors.ImageChanged: lambda _: Answer(500, "backend error"),
}


def answer_for(error: errors.ImageServerError) -> Answer:
    """Look an error's answer up."""
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls](error)
    raise error


def handle(
    req: falcon.Request, resp: falcon.Response, error: errors.ImageServerError, _params: object
) -> None:
    """Answer one of our errors; what the client is not told goes to the journals."""
    request_of(req).failed(error)
    _send(resp, answer_for(error))


def cut_off(
    req: falcon.Request, _resp: falcon.Response, error: errors.ClientGone, _params: object
) -> None:
    """Pass a vanished client on to the server, which closes the connection."""
    request = request_of(req)
    request.leave()
    request.failed(error)
    request.answered(0)
    request.end()
    raise error


def put_off(req: falcon.Request, _resp: falcon.Response, error: WouldWait, _params: object) -> None:
    """Pass a probe back to the server, which makes it again where it may wait."""
    request_of(req).leave()
    raise error


def handle_unexpected(
    req: falcon.Request, resp: falcon.Response, error: Exception, _params: object
) -> None:
    """Answer a bug: the traceback goes to the log, nothing of it to the client.

    No bug is a call that finds no descriptor.
    """
    if isinstance(error, OSError) and error.errno in errors.NO_DESCRIPTOR:
        handle(req, resp, errors.Exhausted(str(error)), _params)
        return
    log.error("%s %s failed", req.method, req.path, exc_info=error)
    request_of(req).failed(error)
    _send(resp, Answer(500, "internal error"))


def handle_http(
    req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError, _params: object
) -> None:
    """Answer what Falcon itself refuses: no route, or a method unknown to HTTP."""
    ours: errors.ImageServerError = errors.BadRequest("bad request")
    if isinstance(error, falcon.HTTPNotFound):
        ours = errors.NotFound(req.path)
    request_of(req).failed(ours)
    _send(resp, Answer(error.status_code, answer_for(ours).message))


def _send(resp: falcon.Response, answer: Answer) -> None:
    resp.status = answer.status
    for name, value in answer.headers.items():
        resp.set_header(name, value)
    set_json(resp, {"error": answer.message, **answer.fields})
