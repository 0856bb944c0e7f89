# SPDX-License-Identifier: Apache-2.0
"""Each HTTP request's account: begun before anything else, ended with the answer.

Where an answer is streamed, its body ends the account, with its last piece or without it.
"""

import contextlib
import itertools
import re
import secrets
import socket
from collections.abc import Callable, MutableSet, Sequence
from functools import partial

import falcon

from imageserver.core.reports import Journal, Underway
from imageserver.core.transfer import Transfer
from imageserver.images.sessions import Need, Session, Sessions
from imageserver.transfers.requests import Request
from imageserver.web.headers import read_close

#: Under this key of the environ the server tells whether the client has gone; from any thread.
IS_GONE = "imageserver.is_gone"
#: ... and here is what ends the connection with this answer.
FORCE_CLOSE = "imageserver.force_close"
#: ... and here a list of what to call once the answer is sent, or cannot be.
AFTERWARDS = "imageserver.afterwards"
#: An id that a client or proxy has chosen: what is safe in a header and in a log line.
_REQUEST_ID = re.compile(r"[0-9A-Za-z._:/+=@-]{1,128}")


class RequestMiddleware:
    """Begins an account with every request, and ends it; the outermost middleware.

    A request has the id that its client or proxy gave it, or one of ours. That need be unique,
    not secret: a number of this process's, after random digits of its own.
    """

    def __init__(
        self, journals: Sequence[Journal], underway: MutableSet[Underway] | None = None
    ) -> None:
        """``underway``: what is to have the requests that use an image now."""
        self._journals = journals
        self._underway = underway
        self._prefix = secrets.token_hex(5)
        self._numbers = itertools.count()

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Begin an account, and name the request to the client."""
        env = req.env
        name: str | None = env.get("HTTP_X_REQUEST_ID")
        if not name or not _REQUEST_ID.fullmatch(name):
            name = f"{self._prefix}{next(self._numbers):06x}"
        req.context.request = Request(
            req.method,
            req.remote_addr,
            name,
            self._journals,
            is_gone=env.get(IS_GONE, _never),
            disconnect=partial(_disconnect, env.get("gunicorn.socket")),
            underway=self._underway,
        )
        resp.set_header("X-Request-Id", name)

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
        if resp.stream is not None:
            return
        afterwards: list[Callable[[], None]] | None = req.env.get(AFTERWARDS)
        if afterwards is None:
            request.end()
        else:  # the client need not wait for the log
            afterwards.append(request.end)


def request_of(req: falcon.Request) -> Request:
    """Return a request's account."""
    request: Request = req.context.request
    return request


def open_session(
    sessions: Sessions, req: falcon.Request, transfer: Transfer, need: Need
) -> Session:
    """Open the session that a request needs: see ``Sessions.open``."""
    return sessions.open(transfer, need, request_of(req))


def close_if_asked(req: falcon.Request) -> None:
    """End the connection with this answer where ``?close=y`` asks for that."""
    if read_close(req) and (force_close := req.env.get(FORCE_CLOSE)):
        force_close()


def _never() -> bool:
    return False


def _disconnect(sock: object) -> None:
    """Shut a connection down, below TLS; ``sock`` is whatever the server has."""
    if isinstance(sock, socket.socket):
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
