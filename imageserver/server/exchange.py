# SPDX-License-Identifier: Apache-2.0
"""One request and its answer, on a thread: from a complete head to the last byte sent.

What this module uses of gunicorn's inside (of which ``tests/unit/server/test_gunicorn.py``
fails when gunicorn changes it; the processes are in ``worker`` and the master's modules):

- ``Request`` parses a head that is in memory; ``request`` adds checks; its ``body`` is replaced
  by ``wire.RequestInput``;
- ``_expected_100_continue`` is cleared, for gunicorn would send 100 before the application runs;
- ``Response`` is subclassed, to take memoryviews and to put the client timeout on each send;
- ``create`` makes the environ.
"""

import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterable
from typing import Any

from gunicorn.http import errors as http
from gunicorn.http.body import ChunkedReader
from gunicorn.http.unreader import Unreader
from gunicorn.http.wsgi import Response, create

from imageserver.core.errors import ClientGone, ImageServerError
from imageserver.images.probing import Asking, WouldWait
from imageserver.server.connection import Connection
from imageserver.server.presence import Presence
from imageserver.server.request import BadHost, ImageRequest
from imageserver.server.wire import BLOCKED, RequestInput, Wire, refusal, refused_head
from imageserver.web.body import ASKING, ZERO_COPY
from imageserver.web.requests import IS_GONE

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


class _HeadReader(Unreader):  # type: ignore[misc]  # gunicorn has no types
    """A head that is in memory; nothing follows it."""

    def __init__(self, head: bytes) -> None:
        super().__init__()
        self.buf.write(head)

    def chunk(self, _size_hint: int | None = None) -> bytes:
        return b""


class ImageResponse(Response):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's response, with pieces of any buffer type sent as they are."""

    def __init__(self, req: Any, sock: Any, cfg: Any, wire: Wire, body: RequestInput) -> None:
        super().__init__(req, sock, cfg)
        self._send: Callable[..., None] = wire.send
        #: Whether the connection ends with this answer.
        self.is_last: Callable[[], bool] = lambda: False
        #: Told when the head is about to go out.
        self.begins: Callable[[], None] = lambda: None
        self.version = "imageserver"
        self.headers_sent = False
        self._body = body

    def collect(self) -> list[bytes]:
        """Collect the answer in the list returned, from now on, instead of sending it."""
        collected: list[bytes] = []
        self._send = lambda *pieces: collected.extend(pieces)
        return collected

    def default_headers(self) -> Any:
        """Decide on keep-alive as late as possible: a body left unread ends the connection."""
        self._body.discard_early()
        if self._body.left or self.is_last():
            self.force_close()
        return super().default_headers()

    def head(self) -> bytes:
        """Return the head, once; empty when it has been sent."""
        if self.headers_sent:
            return b""
        self.headers_sent = True
        self.begins()
        lines = self.default_headers()
        lines.extend([f"{name}: {value}\r\n" for name, value in self.headers])
        return ("".join(lines) + "\r\n").encode("latin-1")

    def write(self, piece: bytes | memoryview) -> None:
        """Send a piece of the body, the head before the first."""
        size = 0 if self._omits_body else len(piece)
        if size == 0:
            self._send(self.head())
            return
        self.sent += size
        if self.response_length is not None and self.sent > self.response_length:
            raise RuntimeError(f"body is longer than its Content-Length {self.response_length}")
        if self.chunked:
            self._send(self.head(), b"%X\r\n" % size, piece, b"\r\n")
        else:
            self._send(self.head(), piece)

    def finish(self) -> None:
        """Send what ends the answer."""
        end = b""
        if not self._omits_body:
            if self.response_length is not None and self.sent != self.response_length:
                raise RuntimeError(f"body has {self.sent} bytes of {self.response_length}")
            end = b"0\r\n\r\n" if self.chunked else b""
        self._send(self.head(), end)


def serve(  # noqa: PLR0913 - what a request needs
    conn: Connection,
    wire: Wire,
    app: Application,
    cfg: Any,
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
    received = bytes(conn.buffer)
    reader = _HeadReader(received)
    try:
        req = ImageRequest(cfg, reader, conn.address, conn.requests)
    except Exception as exc:  # noqa: BLE001 - gunicorn's parse errors have no common root
        _send(conn, _refused_head(conn, exc))
        return False
    conn.buffer[:] = reader.take_buffered()
    resp, environ = _prepare(conn, wire, cfg, req)
    resp.is_last = is_last
    environ[ASKING] = asking
    try:
        _answer(conn, resp, environ, app)
    except WouldWait:
        conn.buffer[:] = received
        conn.requests -= 1
        raise
    return not resp.should_close()


def _prepare(
    conn: Connection, wire: Wire, cfg: Any, req: ImageRequest
) -> tuple[ImageResponse, dict[str, Any]]:
    """Return a request's answer, to be filled, and its WSGI environment."""
    chunked = isinstance(req.body.reader, ChunkedReader)
    # A chunked body is never read (docs/api.md): its end is unknown, so the connection ends.
    body = RequestInput(
        wire,
        conn.buffer,
        1 << 62 if chunked else req.body.reader.length,
        expects_continue=req._expected_100_continue,  # noqa: SLF001
    )
    req._expected_100_continue = False  # noqa: SLF001
    resp, environ = create(
        req, conn.sock, conn.address, conn.listener, cfg, ImageResponse, (wire, body)
    )
    environ["wsgi.input"] = body
    environ["wsgi.multithread"] = True
    if conn.is_tls:
        environ["wsgi.url_scheme"] = "https"  # gunicorn knows of no TLS here
    environ[ZERO_COPY] = True
    presence = Presence(conn.sock, is_tls=conn.is_tls, knows_100=req.version >= (1, 1))
    resp.begins = presence.answering
    environ[IS_GONE] = presence.is_gone
    return resp, environ


def _answer(
    conn: Connection, resp: ImageResponse, environ: dict[str, Any], app: Application
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
        whole = [refusal(500, "internal error")]
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


def _refused_head(conn: Connection, exc: Exception) -> bytes:
    conn.bad_head = True
    status, message = next((s, m) for cls, s, m in _HEAD_ERRORS if isinstance(exc, cls))
    if isinstance(exc, http.InvalidHeader) and exc.hdr == "CONTENT-LENGTH":
        message = "Invalid Content-Length"
    if isinstance(exc, BadHost):
        message = str(exc)
    return refused_head(conn.client, status, message)


def cut(sock: socket.socket) -> None:
    """Make closing the socket send RST, so that the client does not take a part for the whole."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
