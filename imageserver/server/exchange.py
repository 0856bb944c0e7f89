# SPDX-License-Identifier: Apache-2.0
"""One request and its answer, on a thread: from a complete head to the last byte sent.

What this module uses of gunicorn's inside (of which ``tests/unit/server/test_gunicorn.py``
fails when gunicorn changes it; the processes are in ``worker`` and the master's modules):

- ``Request`` parses a head that is in memory, and nothing that follows it; ``request`` adds
  checks, and gives it the configuration as plain attributes; its ``body`` is replaced by
  ``wire.RequestInput``;
- ``_expected_100_continue`` tells whether the client waits for 100;
- ``base_environ``, ``proxy_environ`` (``environ``); ``hop_headers``, ``http_date`` (``response``).
"""

import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

from gunicorn.http import errors as http

from imageserver.core.errors import ClientGone, ImageServerError
from imageserver.images.probing import Asking, WouldWait
from imageserver.server.connection import Connection
from imageserver.server.environ import Gateway
from imageserver.server.presence import Presence
from imageserver.server.request import BadHost, parse_head
from imageserver.server.response import ImageResponse
from imageserver.server.wire import BLOCKED, RequestInput, Wire, refusal, refused_head
from imageserver.web.body import ASKING, ZERO_COPY
from imageserver.web.requests import AFTERWARDS, FORCE_CLOSE, IS_GONE

log = logging.getLogger(__name__)

#: Status and message for a head that cannot be parsed: the first row that fits. gunicorn's own
#: messages quote the client's bytes back, these do not.
_HEAD_ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (http.LimitRequestLine, 414, "request line too long"),
    (http.LimitRequestHeaders, 431, "request head too large"),
    (http.ExpectationFailed, 417, "unsupported expectation; only 100-continue is supported"),
    (http.UnsupportedTransferCoding, 501, "unsupported transfer coding"),
    (http.InvalidRequestLine, 400, "invalid request line"),
    (http.InvalidRequestMethod, 400, "invalid method"),
    (http.InvalidHTTPVersion, 400, "unsupported HTTP version"),
    (http.NoMoreData, 431, "request head too large"),
    (Exception, 400, "invalid request head"),
)

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes | memoryview]]


def serve(  # noqa: PLR0913 - what a request needs
    conn: Connection,
    wire: Wire,
    app: Application,
    gateway: Gateway,
    is_last: Callable[[], bool],
    *,
    asking: Asking = Asking.NOW,
) -> bool:
    """Answer the request whose head is in ``conn.buffer``; return whether another may follow.

    A complete answer that the client does not take at once stays in ``conn.unsent``, for the
    loop. A streamed answer is sent here: this waits for the client.

    ``is_last``: whether the connection ends with this answer; called when its head is sent.

    Raises:
        ClientGone: the connection cannot be used any more, and is to be reset.
        WouldWait: see ``Asking``. The request is in ``conn.buffer`` again, nothing has been sent.
    """
    conn.requests += 1
    head = conn.take_head()
    try:
        req = parse_head(gateway.rules, head, conn.address, conn.requests)
    except Exception as exc:  # noqa: BLE001 - gunicorn's parse errors have no common root
        _send(conn, _refused_head(conn, head, exc))
        return False
    body = RequestInput(wire, conn.buffer, req.length, expects_continue=req.expects_continue)
    presence = Presence(conn.sock, is_tls=conn.is_tls, knows_100=req.version >= (1, 1))
    resp = ImageResponse(req, body, wire.send, is_last=is_last, begins=presence.answering)
    environ = gateway.environ(req, conn)
    environ["wsgi.input"] = body
    environ[ZERO_COPY] = True
    environ[IS_GONE] = presence.is_gone
    environ[FORCE_CLOSE] = resp.force_close
    environ[ASKING] = asking
    afterwards: list[Callable[[], None]] = []
    environ[AFTERWARDS] = afterwards
    try:
        _answer(conn, resp, environ, app, head)
    except WouldWait:
        conn.buffer[:0] = head
        conn.requests -= 1
        raise
    finally:
        for tell in afterwards:
            tell()
    return not resp.should_close()


def _answer(
    conn: Connection, resp: ImageResponse, environ: dict[str, Any], app: Application, head: bytes
) -> None:
    whole: list[bytes] | None = None
    try:
        pieces = app(environ, resp.start_response)
        if isinstance(pieces, list | tuple):  # Falcon's, of an answer that is complete
            whole = resp.collect()
        try:
            for piece in pieces:
                resp.write(piece)
        finally:
            if hasattr(pieces, "close"):
                pieces.close()
        resp.finish()
    except (ClientGone, WouldWait):
        raise
    except Exception as exc:
        if not isinstance(exc, ImageServerError):  # those are in the log already
            log.warning("answer to %s cut off", environ["RAW_URI"], exc_info=exc)
        if resp.headers_sent and whole is None:
            raise ClientGone from exc
        resp.force_close()
        whole = [refusal(500, "internal error", head)]
    if whole:
        _send(conn, b"".join(whole))


def _send(conn: Connection, answer: bytes) -> None:
    """Send what the client takes at once; the loop sends the rest."""
    conn.unsent = answer
    try:
        conn.send()
    except BLOCKED:
        pass
    except OSError as exc:
        raise ClientGone from exc


def _refused_head(conn: Connection, head: bytes, exc: Exception) -> bytes:
    conn.bad_head = True
    status, message = next((s, m) for cls, s, m in _HEAD_ERRORS if isinstance(exc, cls))
    if isinstance(exc, http.InvalidHeader) and exc.hdr == "CONTENT-LENGTH":
        message = "Invalid Content-Length"
    if isinstance(exc, BadHost):
        message = str(exc)
    return refused_head(conn.client, status, message, head)


def cut(sock: socket.socket) -> None:
    """Make closing the socket send RST, so that the client does not take a part for the whole."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
