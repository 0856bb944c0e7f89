# SPDX-License-Identifier: Apache-2.0
"""``GET`` and ``HEAD /images/{id}?format=qcow2``: an image as a qcow2 file (docs/api.md).

All of the file's layout is known before the head is sent, after one walk over the extents. What
identifies the layout is its ``ETag``, so that a download is resumed only where that is the same.

Of an image without an ``ETag`` of its own (NBD, block devices) that tells layouts apart, and not
bytes. So it makes no answer 304, nor one that a cache may keep.
"""

import hashlib
from dataclasses import dataclass

import falcon

from imageserver.core.errors import BadRequest
from imageserver.core.qcow2_layout import Layout, shaped
from imageserver.core.ranges import parse_range, whole
from imageserver.core.transfer import Transfer
from imageserver.core.validators import UNKNOWN_STATE, Conditions, Validators
from imageserver.images import sessions
from imageserver.images.probing import Asking, WouldTransfer
from imageserver.images.qcow2_stream import stream, survey
from imageserver.images.sessions import Session, Sessions
from imageserver.web.bitmaps import say_bitmap
from imageserver.web.body import StreamedBody
from imageserver.web.conditions import answer_not_modified, read_conditions, say_state
from imageserver.web.headers import read_range
from imageserver.web.qcow2_parameters import Qcow2Wanted
from imageserver.web.requests import open_session


@dataclass(frozen=True, slots=True)
class _File:
    """What is known of a file after one walk over the extents."""

    layout: Layout
    bitmap: str | None
    """Of what is dirty; None: everything is in the file, which stands alone."""
    state: Validators
    """No ``etag``: the image is a file that has just been changed, and has none itself."""
    names_bytes: bool
    """The ``etag`` covers the image's bytes, and not the layout alone."""

    @property
    def is_overlay(self) -> bool:
        return self.bitmap is not None

    def is_wanted(self, conditions: Conditions) -> bool:
        """Tell whether a read goes on; False: 304.

        Raises:
            PreconditionFailed: the file is in a state that the request excludes.
        """
        return conditions.allow(self.state) or not self.names_bytes


class Qcow2Answers:
    """An image as a qcow2 file: its answers."""

    def __init__(self, opened: Sessions) -> None:
        self._sessions = opened

    def head(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        transfer: Transfer,
        wanted: Qcow2Wanted,
        asking: Asking,
    ) -> None:
        """Send GET's headers for the whole file.

        Raises:
            WouldTransfer: this thread is for quick answers only.
        """
        if asking is not Asking.NOW:
            raise WouldTransfer
        conditions = read_conditions(req)
        with self._open(req, transfer, wanted) as session:
            file = _look_at(session, transfer, wanted)
        if not file.is_wanted(conditions):
            answer_not_modified(resp, file.state)
            return
        _describe(req, resp, transfer, wanted, file)
        resp.content_length = file.layout.length

    def get(
        self, req: falcon.Request, resp: falcon.Response, transfer: Transfer, wanted: Qcow2Wanted
    ) -> None:
        """Send the file, or one range of it."""
        conditions = read_conditions(req)
        part = read_range(req)
        session = self._open(req, transfer, wanted)
        try:
            file = _look_at(session, transfer, wanted)
            if not file.is_wanted(conditions):
                session.close()
                answer_not_modified(resp, file.state)
                return
            if conditions.allow_range(file.state):
                part = parse_range(req.get_header("Range", required=True))
            span = part.resolve(file.layout.length) if part else whole(file.layout.length)
            one_state = conditions.names_state and file.names_bytes
            pieces = stream(
                session, file.layout, span, overlay=file.is_overlay, one_state=one_state
            )
            body = StreamedBody(req, session, pieces)
        except BaseException:
            session.close()
            raise
        _describe(req, resp, transfer, wanted, file)
        if part:
            resp.status = falcon.HTTP_PARTIAL_CONTENT
            resp.set_header("Content-Range", span.content_range)
        resp.content_length = span.length
        resp.stream = body

    def _open(self, req: falcon.Request, transfer: Transfer, wanted: Qcow2Wanted) -> Session:
        if refusal := transfer.image.kind.qcow2_refusal:
            raise BadRequest(refusal)
        need = sessions.DIRTY_QCOW2 if wanted.dirty else sessions.QCOW2
        return open_session(self._sessions, req, transfer, need)


def _look_at(session: Session, transfer: Transfer, wanted: Qcow2Wanted) -> _File:
    bitmap = session.backend.dirty_bitmap if wanted.dirty else None
    backing = (None, None) if bitmap is None else (wanted.backing, wanted.backing_format)
    shape = shaped(session.size, wanted.cluster_size, *backing)
    layout = survey(session, shape, overlay=bitmap is not None)
    state = session.info.state or UNKNOWN_STATE
    is_young = state.modified is not None and state.etag is None
    etag = None if is_young else _etag(transfer, bitmap, layout, state)
    return _File(layout, bitmap, Validators(etag), names_bytes=state.etag is not None)


def _etag(transfer: Transfer, bitmap: str | None, layout: Layout, state: Validators) -> str:
    """Return a validator of the file, as far as one can be had.

    Beside layout and parameters it covers which image the transfer names, and which server answers
    for that: both may change under an id; and, of an image that has one, the state of its bytes.
    """
    image, shape = transfer.image, layout.shape
    told = (
        *(image.kind.name, *image.identity(), image.stamp()),
        *(bitmap, shape.backing, shape.backing_format, layout.digest(), state.etag),
    )
    return f'"{hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()}"'


def _describe(
    req: falcon.Request,
    resp: falcon.Response,
    transfer: Transfer,
    wanted: Qcow2Wanted,
    file: _File,
) -> None:
    if wanted.dirty:
        say_bitmap(req, resp, transfer, file.bitmap)
    resp.content_type = "application/octet-stream"
    if file.names_bytes:
        say_state(resp, file.state)
    elif file.state.etag is not None:
        resp.set_header("ETag", file.state.etag)
