# SPDX-License-Identifier: Apache-2.0
"""Each HTTP request's account: begun before anything else, ended with the answer.

Where an answer is streamed, its body ends the account, with its last piece or without it.
"""

import contextlib
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import falcon

from imageserver.core.ports import Journal
from imageserver.core.transfer import Transfer
from imageserver.images.sessions import Need, Session, Sessions
from imageserver.transfers.requests import Request

#: Under this key of the environ the server tells whether the client has gone; from any thread.
IS_GONE = "imageserver.is_gone"
#: An id that a client or proxy has chosen: what is safe in a header and in a log line.
_REQUEST_ID = re.compile(r"[0-9A-Za-z._:/+=@-]{1,128}")


class RequestMiddleware:
    """Begins an account with every request, and ends it; the outermost middleware."""

    def __init__(self, journals: Sequence[Journal]) -> None:
        self._journals = journals

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Begin an account, and name the request to the client."""
        request = req.context.request = Request(
            req.method,
            req.remote_addr,
            _name(req.get_header("X-Request-Id")),
            self._journals,
            is_gone=req.env.get(IS_GONE, _never),
            disconnect=_disconnector(req.env.get("gunicorn.socket")),
        )
        resp.set_header("X-Request-Id", request.name)

    def process_response(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        _resource: object,
        _req_succeeded: bool,  # noqa: FBT001 - Falcon's signature
    ) -> None:
        """End the account of an answer that is whole."""
        request = request_of(req)
        request.answered(resp.status_code)
        if resp.stream is None:
            request.end()


def request_of(req: falcon.Request) -> Request:
    """Return a request's account."""
    request: Request = req.context.request
    return request


def open_session(
    sessions: Sessions, req: falcon.Request, transfer: Transfer, need: Need
) -> Session:
    """Open the session that a request needs: see ``Sessions.open``."""
    return sessions.open(transfer, need, request_of(req))


def _never() -> bool:
    return False


def _name(given: str | None) -> str:
    if given and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(8)


def _disconnector(sock: Any) -> Callable[[], None]:  # noqa: ANN401 - whatever the server has
    def disconnect() -> None:
        if isinstance(sock, socket.socket):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS

    return disconnect
