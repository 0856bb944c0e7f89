# SPDX-License-Identifier: Apache-2.0
"""``/images/{id}``: probe, read, write, patch.

Each responder: parse the headers, open a session, run the operation, answer. Which method
an image has is asked by the middleware before any responder runs.
"""

import logging
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache

import falcon

from imageserver.core import patches
from imageserver.core.bounds import MAX_SIZE
from imageserver.core.entry import fields
from imageserver.core.errors import (
    BackendError,
    BadRequest,
    Exhausted,
    FileAccessError,
    UnsupportedMediaType,
)
from imageserver.core.kinds import Announcement, ImageInfo
from imageserver.core.ranges import parse_content_range, parse_range, whole
from imageserver.core.transfer import Transfer
from imageserver.images import operations, sessions
from imageserver.images.operations import READ_ONLY_METHODS, check_writable
from imageserver.images.probing import MEMORY_SECONDS, Asking, Inspector
from imageserver.images.sessions import Session, Sessions
from imageserver.web.answers import OK, set_encoded, to_json, written
from imageserver.web.body import ASKING, StreamedBody, read_all, source_of
from imageserver.web.conditions import answer_not_modified, read_conditions, say_state
from imageserver.web.headers import (
    body_length,
    check_method,
    full_body_length,
    is_json,
    json_length,
    read_digests,
    read_flush,
    read_range,
)
from imageserver.web.qcow2_answers import Qcow2Answers
from imageserver.web.qcow2_parameters import read_qcow2
from imageserver.web.requests import close_if_asked, open_session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What OPTIONS announces beside the image's own abilities."""

    max_readers: int
    max_writers: int
    unix_socket: str | None


#: What OPTIONS of the server itself says but for the limits: all that any image may have.
_FEATURES = ("extents", "zero", "flush", "digest", "checksum", "qcow2")
_METHODS = ("GET", "PUT", "PATCH", "POST", "OPTIONS")


class ImageResource:
    """One image as a whole, or ranges of it."""

    def __init__(
        self, opened: Sessions, inspector: Inspector, limits: Limits, *, put_flushes: bool = False
    ) -> None:
        self._sessions = opened
        self._put_flushes = put_flushes
        self._inspector = inspector
        self._qcow2 = Qcow2Answers(opened)
        self._limits = limits
        self._announcer = Announcer(limits)

    def check_method(self, method: str, transfer: Transfer) -> None:
        """Refuse a method that this image lacks, before anything is opened."""
        kind = transfer.image.kind
        if method == "PATCH" and kind.patch_refusal:
            raise BadRequest(kind.patch_refusal)
        methods: tuple[str, ...] = READ_ONLY_METHODS
        if not transfer.read_only:
            methods += ("PUT", "PATCH") if kind.writes_ranges else ("PUT",)
        check_method(method, methods)

    def on_options(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Say what the image can do; no lock, no slot."""
        kind, read_only = transfer.image.kind, transfer.read_only
        asks = kind.asks_server or kind.looks
        info = self._info(transfer, _asking(req)) if asks else kind.assumed
        told = kind.announcement(info, self._limits.max_writers, read_only=read_only)
        self._announcer.announce(resp, told)

    def on_head(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Send GET's headers for the whole image; no slot."""
        if req.query_string and (wanted := read_qcow2(req)):
            self._qcow2.head(req, resp, transfer, wanted, _asking(req))
            return
        conditions = read_conditions(req)
        info = self._inspector.inspect(transfer.image, MEMORY_SECONDS, _asking(req))
        if not conditions.allow(info.state):
            answer_not_modified(resp, info.state)
            return
        resp.content_type = "application/octet-stream"
        resp.content_length = info.size
        say_state(resp, info.state)

    def on_get(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Send the image, or one range of it."""
        close_if_asked(req)
        if req.query_string and (qcow2 := read_qcow2(req)):
            self._qcow2.get(req, resp, transfer, qcow2)
            return
        conditions = read_conditions(req)
        wanted = read_range(req)
        session = self._open(req, transfer, sessions.READ)
        try:
            state = session.info.state
            if not conditions.allow(state):
                session.close()
                answer_not_modified(resp, state)
                return
            if conditions.allow_range(state):
                wanted = parse_range(req.get_header("Range", required=True))
            span = wanted.resolve(session.size) if wanted else whole(session.size)
            is_kept = conditions.names_state or not transfer.image.kind.writes_ranges
            one_state = is_kept and state is not None and state.etag is not None
            body = StreamedBody(req, session, operations.read(session, span, one_state=one_state))
        except BaseException:
            session.close()
            raise
        if wanted:
            resp.status = falcon.HTTP_PARTIAL_CONTENT
            resp.set_header("Content-Range", span.content_range)
        resp.content_type = "application/octet-stream"
        resp.content_length = span.length
        say_state(resp, state)
        resp.stream = body

    def on_put(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Replace the whole image by the body, or with ``Content-Range`` a part of it."""
        close_if_asked(req)
        flush = read_flush(req)
        part: str | None = req.env.get("HTTP_CONTENT_RANGE")
        if part and transfer.image.kind.writes_ranges:
            length, flushed = self._put_range(req, transfer, part, flush=flush)
        else:
            length, flushed = self._put_whole(req, transfer, flush=flush)
        set_encoded(resp, written(length, flushed=None if flush is None else flushed))

    def _put_whole(
        self, req: falcon.Request, transfer: Transfer, *, flush: bool | None
    ) -> tuple[int, bool]:
        length = full_body_length(req)
        expected = read_digests(req, is_whole=True)
        conditions = read_conditions(req)
        with self._open(req, transfer, sessions.REPLACE) as session:
            check_writable(session.info)
            if transfer.image.kind.has_fixed_size:
                _check_size(length, session.size)
            else:
                _check_bound(length)
            conditions.check(session.info.state)
            with closing(source_of(req, length, expected)) as source:
                done = operations.replace(session, length, source, flush=self._flushes(flush))
        return length, done

    def _put_range(
        self, req: falcon.Request, transfer: Transfer, part: str, *, flush: bool | None
    ) -> tuple[int, bool]:
        if "HTTP_RANGE" in req.env:
            raise BadRequest("Range/Content-Range not supported; full writes only")
        wanted = parse_content_range(part, body_length(req))
        expected = read_digests(req, is_whole=False)
        conditions = read_conditions(req)
        need = sessions.WRITE_ALONE if conditions.names_state else sessions.WRITE
        with self._open(req, transfer, need) as session:
            check_writable(session.info)
            span = wanted.resolve(session.size)
            conditions.check(session.info.state)
            with closing(source_of(req, span.length, expected)) as source:
                done = operations.write(session, span, source, flush=self._flushes(flush))
        return span.length, done

    def _flushes(self, asked: bool | None) -> bool:  # noqa: FBT001
        return self._put_flushes if asked is None else asked

    def on_patch(self, req: falcon.Request, resp: falcon.Response, transfer: Transfer) -> None:
        """Write a range, zero one, or flush."""
        if is_json(req):
            self._patch_json(req, transfer)
            set_encoded(resp, OK)
        elif req.get_header("Range") is not None:
            length = self._patch_range(req, transfer)
            set_encoded(resp, written(length))
        else:
            raise UnsupportedMediaType(
                "PATCH requires Content-Type: application/json (for zero/flush) "
                "or Range with binary body"
            )

    def _patch_json(self, req: falcon.Request, transfer: Transfer) -> None:
        # The body is read before lock and slot are taken: only the body says which slot, and a
        # client that sends it slowly holds nothing.
        conditions = read_conditions(req)
        patch = patches.parse_patch(read_all(req, json_length(req)))
        if isinstance(patch, patches.Zero):
            need = sessions.ZERO_ALONE if conditions.names_state else sessions.ZERO
            with self._open(req, transfer, need) as session:
                check_writable(session.info)
                span = patch.resolve(session.size)
                conditions.check(session.info.state)
                operations.zero(session, span, flush=patch.flush)
        else:
            with self._open(req, transfer, sessions.FLUSH) as session:
                operations.flush(session)

    def _patch_range(self, req: falcon.Request, transfer: Transfer) -> int:
        wanted = parse_range(req.get_header("Range", required=True))
        length = body_length(req)
        if length == 0:
            raise BadRequest("Content-Length must be positive")
        expected = read_digests(req, is_whole=False)
        conditions = read_conditions(req)
        need = sessions.WRITE_ALONE if conditions.names_state else sessions.WRITE
        with self._open(req, transfer, need) as session:
            check_writable(session.info)
            span = wanted.resolve(session.size)
            if span.length != length:
                raise BadRequest(
                    f"Content-Length ({length}) must equal range length ({span.length})"
                )
            conditions.check(session.info.state)
            with closing(source_of(req, length, expected)) as source:
                operations.write(session, span, source)
        return length

    def _open(self, req: falcon.Request, transfer: Transfer, need: sessions.Need) -> Session:
        return open_session(self._sessions, req, transfer, need)

    def _info(self, transfer: Transfer, asking: Asking) -> ImageInfo:
        try:
            return self._inspector.inspect(transfer.image, MEMORY_SECONDS, asking)
        except (BackendError, FileAccessError, Exhausted) as exc:
            told = fields(transfer=transfer.id, detail=exc)
            log.warning("options answered from configuration", extra=told)
            return transfer.image.kind.assumed


def _asking(req: falcon.Request) -> Asking:
    """Return whether this thread may wait for a back end; under other servers any may."""
    asking: Asking = req.env.get(ASKING, Asking.NOW)
    return asking


class Announcer:
    """Answers OPTIONS. There are few different answers, so they are kept."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._made = lru_cache(maxsize=32)(self._make)

    def announce(self, resp: falcon.Response, what: Announcement) -> None:
        """Say what an image, or the server, can do."""
        allow, methods, body = self._made(what)
        resp.set_header("Allow", allow)
        resp.set_header("Access-Control-Allow-Methods", methods)
        set_encoded(resp, body)

    def _make(self, what: Announcement) -> tuple[str, str, bytes]:
        methods = ", ".join(what.methods)
        answer = {
            "unix_socket": self._limits.unix_socket,
            "features": what.features,
            "max_readers": self._limits.max_readers,
            "max_writers": what.writers,
        }
        return methods.replace("GET", "GET, HEAD"), methods, to_json(answer)


class ServerResource:
    """``OPTIONS /images/*`` and ``OPTIONS *``: what the server can do (docs/api.md)."""

    def __init__(self, limits: Limits) -> None:
        self._announcer = Announcer(limits)
        self._everything = Announcement(_FEATURES, _METHODS, limits.max_writers)

    def on_options(self, _req: falcon.Request, resp: falcon.Response) -> None:
        """Answer from the settings alone: what a load balancer probes."""
        self._announcer.announce(resp, self._everything)


def _check_bound(length: int) -> None:
    """Refuse a length that no file can have (off_t)."""
    if length > MAX_SIZE:
        raise BadRequest("Invalid Content-Length")


def _check_size(length: int, size: int) -> None:
    if length != size:
        raise BadRequest(f"Content-Length ({length}) must equal export size ({size})")
