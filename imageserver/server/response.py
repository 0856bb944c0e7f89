# SPDX-License-Identifier: Apache-2.0
"""An answer's head and framing (PEP 3333; RFC 9112 section 6), with pieces of any buffer type.

The head is sent with the first piece of the body, in one call. It is made as late as possible:
only then is it known whether the connection can go on.
"""

import re
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import TracebackType

from gunicorn.util import hop_headers, http_date

from imageserver.server.commonhead import CommonHead
from imageserver.server.request import ImageRequest
from imageserver.server.wire import RequestInput

#: RFC 9112 section 4.
_STATUS = re.compile(r"([0-9]{3})(?: [ \t\x21-\x7e\x80-\xff]*)?")
#: RFC 9110 section 5.1 and 5.5.
_FIELD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+: [ \t\x21-\x7e\x80-\xff]*\r\n")
#: Statuses below are interim answers.
_FINAL = 200
_NO_CONTENT, _NOT_MODIFIED = 204, 304
_BLANK = " \t"

Send = Callable[..., None]
_Error = tuple[type[BaseException], BaseException, TracebackType]


class ImageResponse:
    """One answer. ``start_response`` is WSGI's; ``write`` and ``finish`` send."""

    def __init__(
        self,
        req: CommonHead | ImageRequest,
        body: RequestInput,
        send: Send,
        *,
        is_last: Callable[[], bool],
        begins: Callable[[], None],
    ) -> None:
        """``is_last`` tells whether the connection ends with this answer.

        ``begins`` is told when the head is about to go out.
        """
        self.headers_sent = False
        self._req, self._body, self._send = req, body, send
        self._is_last, self._begins = is_last, begins
        self._must_close = False
        self._status = self._fields = ""
        self._code = 0
        self._length: int | None = None
        self._sent = 0
        self._omits_body = self._is_chunked = False

    def start_response(
        self, status: str, headers: Sequence[tuple[str, str]], exc_info: _Error | None = None
    ) -> Callable[[bytes], None]:
        """Take status and headers: see PEP 3333.

        Raises:
            ValueError: they are not ones that HTTP has.
            RuntimeError: there are some already.
        """
        if exc_info and self.headers_sent:
            raise exc_info[1].with_traceback(exc_info[2])
        if self._status and not exc_info:
            raise RuntimeError("start_response was called twice")
        self._status, self._code = status, _code(status)
        self._set_fields(headers)
        # RFC 9110 section 6.4.1.
        is_bodiless = self._code < _FINAL or self._code in {_NO_CONTENT, _NOT_MODIFIED}
        self._omits_body = is_bodiless or self._req.method == "HEAD"
        has_end = self._length is not None or self._omits_body
        self._is_chunked = not has_end and self._req.version >= (1, 1)
        # An answer that only the connection's end ends.
        self._must_close = self._must_close or not (has_end or self._is_chunked)
        return self.write

    def _set_fields(self, headers: Sequence[tuple[str, str]]) -> None:
        self._length = None
        lines: list[str] = []
        for name, value in headers:
            line, length = _line(name, value)
            if length is not None:
                if self._code < _FINAL or self._code == _NO_CONTENT:
                    continue  # RFC 9110 section 8.6
                self._length = length
            lines.append(line)
        self._fields = "".join(lines)

    def collect(self) -> list[bytes]:
        """Collect the answer in the list returned, from now on, instead of sending it."""
        collected: list[bytes] = []
        self._send = lambda *pieces: collected.extend(pieces)
        return collected

    def force_close(self) -> None:
        """End the connection with this answer."""
        self._must_close = True

    def should_close(self) -> bool:
        """Tell whether the connection ends with this answer."""
        return self._must_close or self._req.should_close()

    def _head(self) -> bytes:
        """Return the head, once; empty when it has been sent."""
        if self.headers_sent:
            return b""
        if not self._status:
            raise RuntimeError("start_response was not called")
        # A body left unread ends the connection, but for what has come of it already.
        self._body.discard_early()
        if self._body.left or self._is_last():
            self._must_close = True
        self.headers_sent = True
        self._begins()
        version = "HTTP/1.1" if self._req.version == (1, 1) else "HTTP/1.0"
        connection = "close" if self.should_close() else "keep-alive"
        coding = "Transfer-Encoding: chunked\r\n" if self._is_chunked else ""
        return (
            f"{version} {self._status}\r\n"
            f"Server: imageserver\r\nDate: {_date(int(time.time()))}\r\n"
            f"Connection: {connection}\r\n{coding}{self._fields}\r\n"
        ).encode("latin-1")

    def write(self, piece: bytes | memoryview) -> None:
        """Send a piece of the body, the head before the first."""
        size = 0 if self._omits_body else len(piece)
        if size == 0:
            self._send(self._head())
            return
        self._sent += size
        if self._length is not None and self._sent > self._length:
            raise RuntimeError(f"body is longer than its Content-Length {self._length}")
        if self._is_chunked:
            self._send(self._head(), b"%X\r\n" % size, piece, b"\r\n")
        else:
            self._send(self._head(), piece)

    def finish(self) -> None:
        """Send what ends the answer."""
        end = b""
        if not self._omits_body:
            if self._length is not None and self._sent != self._length:
                raise RuntimeError(f"body has {self._sent} bytes of {self._length}")
            end = b"0\r\n\r\n" if self._is_chunked else b""
        if end or not self.headers_sent:
            self._send(self._head(), end)


@lru_cache(maxsize=64)
def _code(status: str) -> int:
    found = _STATUS.fullmatch(status)
    if not found:
        raise ValueError(f"invalid status {status!r}")
    return int(found[1])


@lru_cache(maxsize=256)  # most fields of an answer are those of the answer before
def _line(name: str, value: str) -> tuple[str, int | None]:
    """Return a field's line, and of Content-Length its value.

    Empty: it is not the application's to send.

    Raises:
        ValueError: HTTP has no such field.
    """
    lower = name.lower()
    line = f"{name}: {value.strip(_BLANK)}\r\n"
    if not _FIELD.fullmatch(line):
        raise ValueError("invalid header in an answer")
    length = int(value) if lower == "content-length" else None
    return "" if lower in hop_headers else line, length  # and Server, and Date


@lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    return str(http_date(seconds))
