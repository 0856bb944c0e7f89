# SPDX-License-Identifier: Apache-2.0
"""What can be done to an image: each function moves bytes and shows progress, and knows no HTTP.

An operation that streams closes the session *before* it yields the last piece: a client that
has received the last byte must not be refused, by its own lock or slot, when it asks again.
"""

from collections.abc import Generator
from contextlib import closing
from typing import TypeVar

from imageserver.core.errors import BadRequest, ImageChanged, MethodNotAllowed
from imageserver.core.extents import Extent
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Backend
from imageserver.core.ranges import Span, whole
from imageserver.core.sources import Body
from imageserver.images.sessions import Session

_Piece = TypeVar("_Piece", bound=memoryview | bytes)

#: What a read-only image allows (docs/api.md).
READ_ONLY_METHODS = ("GET", "HEAD", "OPTIONS")


def check_writable(info: ImageInfo) -> None:
    """Raise ``MethodNotAllowed`` for a read-only image."""
    if info.read_only:
        raise MethodNotAllowed(READ_ONLY_METHODS)


def read(session: Session, span: Span, *, one_state: bool = False) -> Generator[memoryview]:
    """Yield the bytes of ``span``; each piece is valid until the next is asked for.

    ``one_state``: all are of the image's state as it was opened, which has an ETag.

    Raises:
        ImageChanged: they are not.
    """
    made = session.backend.read(span.start, span.length)
    return sent(session, span, made, one_state=one_state)


def _of_one_state(backend: Backend, made: Generator[_Piece]) -> Generator[_Piece]:
    with closing(made) as pieces:
        for piece in pieces:
            if not backend.is_unchanged():
                raise ImageChanged("the file was changed while it was read")
            yield piece


def sent(
    session: Session, span: Span, made: Generator[_Piece], *, one_state: bool = False
) -> Generator[_Piece]:
    """Yield the pieces made of ``span``, and show progress; ``one_state``: see ``read``."""
    if one_state:
        made = _of_one_state(session.backend, made)
    session.request.begin(span)
    with session, closing(made) as pieces:
        done = 0
        for piece in pieces:
            done += len(piece)
            session.request.progress(done)
            if done == span.length:
                session.close()
            yield piece


def _check_edges(session: Session, span: Span) -> None:
    """Refuse edges inside a block that another writer may be rewriting at this moment.

    Raises:
        BadRequest: the image is shared, and a block of its back end covered only in part.
    """
    align = session.backend.align
    if session.shared and (span.start % align or (span.stop % align and span.stop < span.size)):
        raise BadRequest(
            f"range must begin and end at multiples of {align} bytes while writers share the image"
        )


def write(session: Session, span: Span, source: Body, *, flush: bool = False) -> bool:
    """Write ``span`` from ``source``; tell whether ``flush`` was asked for and done."""
    _check_edges(session, span)
    session.request.begin(span)
    for done in session.backend.write(span.start, span.length, source):
        session.request.progress(done)
    return _finish(session, source, span.length, flush=flush)


def replace(session: Session, length: int, source: Body, *, flush: bool = False) -> bool:
    """Make ``length`` bytes from ``source`` the whole image; returns what ``write`` does."""
    session.request.begin(whole(length))
    for done in session.backend.replace(length, source):
        session.request.progress(done)
    return _finish(session, source, length, flush=flush)


def _finish(session: Session, source: Body, length: int, *, flush: bool) -> bool:
    """Flush, and only then verify: what does not match is in the image, and treated as such."""
    flushed = _flush_own(session, asked=flush)
    source.verify(length)
    return flushed


def zero(session: Session, span: Span, *, flush: bool) -> None:
    """Zero ``span``; then flush, where asked for and possible."""
    _check_edges(session, span)
    session.request.begin(span)
    for done in session.backend.zero(span.start, span.length):
        session.request.progress(done)
    _flush_own(session, asked=flush)


def _flush_own(session: Session, *, asked: bool) -> bool:
    """Flush what this session has written, where asked for or where no other session's flush would.

    Tells whether it was asked for and done.
    """
    info = session.info
    if info.can_flush and (asked or not info.flushes_image):
        session.backend.flush()
    return asked and info.can_flush


def flush(session: Session) -> None:
    """Bring the image's data to stable storage.

    Raises:
        BadRequest: the export offers no flush.
    """
    if not session.info.can_flush:
        raise BadRequest("flush not supported by this export")
    session.backend.flush()


def extents(session: Session, span: Span, *, dirty: bool) -> Generator[list[Extent]]:
    """Yield the extents of ``span`` in lists, the last of which may be empty."""
    session.request.begin(span)
    listed = session.backend.extents(span.start, span.stop, dirty=dirty)
    with session, closing(listed) as batches:
        for batch in batches:
            if batch:
                session.request.progress(batch[-1][0] + batch[-1][1] - span.start)
            yield batch
