# SPDX-License-Identifier: Apache-2.0
"""Bodies: the client's as a source of bytes, ours as something a server can iterate.

The zero-copy way is one small agreement with the server (``server/exchange.py``): it marks
the environ with ``ZERO_COPY``, accepts memoryviews as pieces of a body, and its
``wsgi.input`` has ``readinto``. Under any other WSGI server pieces are copied into bytes.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import falcon

from imageserver.core.digests import Expected
from imageserver.core.errors import BadRequest, ClientGone
from imageserver.core.sources import HasFileno
from imageserver.images.hashing import Hashed
from imageserver.images.sessions import Session

#: A true value under this key: the server takes memoryviews, and gives ``readinto``.
ZERO_COPY = "imageserver.zero_copy"
#: Under this key: whether the thread may wait for a back end, a ``probing.Asking``.
ASKING = "imageserver.asking"


class RequestSource:
    """The request's body, ``length`` bytes of it: a ``sources.Body``."""

    def __init__(self, req: falcon.Request, length: int) -> None:
        self._input: Any = req.env["wsgi.input"]
        self._left = length
        self._zero_copy = bool(req.env.get(ZERO_COPY))

    def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        """Fill ``buffer`` with what has arrived: see ``sources.Source``."""
        wanted = min(len(buffer), self._left)
        if wanted == 0:
            return 0
        if self._zero_copy:
            count: int = self._input.readinto(buffer[:wanted], until)
        else:
            count = self._copy(buffer, wanted)
        self._left -= count
        return count

    def verify(self, written: int = 0) -> None:
        """Return: this client has not said what it sends."""

    def close(self) -> None:
        """Return: nothing is held."""

    def _copy(self, buffer: memoryview, wanted: int) -> int:
        try:
            data = self._input.read(wanted)
        except OSError as exc:
            raise ClientGone from exc
        buffer[: len(data)] = data
        return len(data)


def source_of(
    req: falcon.Request, length: int, expected: Sequence[Expected]
) -> RequestSource | Hashed:
    """Return the request's body, hashed if the client has said what to expect. Close it."""
    source = RequestSource(req, length)
    return Hashed(source, length, expected) if expected else source


def read_all(req: falcon.Request, length: int) -> bytes:
    """Read a small body whole.

    Raises:
        BadRequest: it ends early.
        ClientGone: the connection broke, or this takes longer than the client timeout.
    """
    body = b""
    while len(body) < length:
        try:
            data: bytes = req.env["wsgi.input"].read(length - len(body))
        except OSError as exc:
            raise ClientGone from exc
        if not data:
            raise BadRequest("request body truncated")
        body += data
    return body


class StreamedBody:
    """A body that owns its session until its last piece, an error, or ``close()``.

    Making one asks for the first piece, so that what fails before the first byte still gets
    an answer. It has no ``read``: file wrappers would cut it to pieces again.
    """

    def __init__(
        self, req: falcon.Request, session: Session, pieces: Generator[memoryview | bytes]
    ) -> None:
        self._session = session
        self._pieces = pieces
        self._request = session.request
        self._is_whole = False
        self._zero_copy = bool(req.env.get(ZERO_COPY))
        try:
            self._first = next(pieces, None)
        except BaseException:
            self._give_back()
            raise

    def __iter__(self) -> Iterator[Any]:
        piece = self._first
        try:
            while piece is not None:
                yield self._piece(piece)
                self._request.sent += len(piece)
                piece = next(self._pieces, None)
        except BaseException as exc:
            self._request.failed(exc)
            raise
        self._is_whole = True

    def _piece(self, piece: memoryview | bytes) -> memoryview | bytes:
        return piece if self._zero_copy else bytes(piece)

    def close(self) -> None:
        """Give the session back, wherever the body had come to, and end the request."""
        self._give_back()
        if not self._is_whole:
            self._request.failed(ClientGone())
        self._request.end()

    def _give_back(self) -> None:
        self._pieces.close()
        self._session.close()
