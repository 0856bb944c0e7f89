# SPDX-License-Identifier: Apache-2.0
"""``/images/{id}/extents``: the image's map as a JSON list, streamed.

Millions of extents go out in pieces as the back end answers; none of it is kept. The text
is put together by hand: the shape is fixed, and this is several times faster than making
dictionaries for an encoder.
"""

import time
from collections.abc import Callable, Generator, Iterator
from typing import TypeAlias

import falcon

from imageserver.core.errors import BadRequest
from imageserver.core.extents import Extent
from imageserver.core.ranges import whole
from imageserver.core.transfer import Transfer
from imageserver.images import operations, sessions
from imageserver.images.sessions import Session, Sessions
from imageserver.web.bitmaps import say_bitmap
from imageserver.web.body import StreamedBody
from imageserver.web.headers import check_method, read_span
from imageserver.web.requests import open_session

_CONTEXTS = {"zero": sessions.EXTENTS, "dirty": sessions.DIRTY_EXTENTS}
_BOOL = ("false", "true")
#: How long nothing is written at most while extents are asked for, in seconds.
_QUIET_SECONDS = 1.0


#: Makes the texts of a batch.
Writer: TypeAlias = Callable[[list[Extent]], Iterator[str]]


class ExtentsResource:
    """What of an image is data, zero, or dirty."""

    def __init__(self, opened: Sessions) -> None:
        self._sessions = opened

    def check_method(self, method: str, _transfer: Transfer) -> None:
        """Refuse all but GET."""
        check_method(method, ("GET",))

    def on_get(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Send the list of extents."""
        if refusal := transfer.image.kind.extents_refusal:
            raise BadRequest(refusal)
        context = req.get_param("context", default="zero")
        if context not in _CONTEXTS:
            raise BadRequest('unsupported context; only "zero" and "dirty" are supported')
        wanted = read_span(req)
        session = open_session(self._sessions, req, transfer, _CONTEXTS[context])
        try:
            span = wanted.resolve(session.size) if wanted else whole(session.size)
            dirty = context == "dirty"
            bitmap = session.backend.dirty_bitmap if dirty else None
            write = _writer(session, dirty=dirty)
            pieces = encode(operations.extents(session, span, dirty=dirty), write)
            body = StreamedBody(req, session, pieces)
        except BaseException:
            session.close()
            raise
        if dirty:
            say_bitmap(req, resp, transfer, bitmap)
        resp.content_type = falcon.MEDIA_JSON
        resp.stream = body


def encode(
    batches: Iterator[list[Extent]], write: Writer, clock: Callable[[], float] = time.monotonic
) -> Generator[bytes]:
    """Write batches of extents as one JSON list.

    Of a long walk that finds nothing new, white space is written: JSON has room for it, and a
    client that has gone is noticed by it alone, and would keep the image until the end.
    """
    opening, told = "[", clock()
    for batch in batches:
        if batch:
            yield (opening + ",".join(write(batch))).encode()
            opening, told = ",", clock()
        elif clock() - told >= _QUIET_SECONDS:
            yield b" "
            told = clock()
    yield b"[]" if opening == "[" else b"]"


def _writer(session: Session, *, dirty: bool) -> Writer:
    if dirty:
        return with_dirty
    return with_hole if session.backend.tells_holes else with_zero


def with_zero(batch: list[Extent]) -> Iterator[str]:
    """Say of extents where they are, and whether they are zero."""
    return (f'{{"start":{s},"length":{n},"zero":{_BOOL[z]}}}' for s, n, z, _ in batch)


def with_hole(batch: list[Extent]) -> Iterator[str]:
    """... and whether they are holes."""
    return (
        f'{{"start":{s},"length":{n},"zero":{_BOOL[z]},"hole":{_BOOL[h]}}}' for s, n, z, h in batch
    )


def with_dirty(batch: list[Extent]) -> Iterator[str]:
    """... or whether they are dirty."""
    return (
        f'{{"start":{s},"length":{n},"dirty":{_BOOL[d]},"zero":{_BOOL[z]}}}' for s, n, z, d in batch
    )
