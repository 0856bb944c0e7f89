# SPDX-License-Identifier: Apache-2.0
"""The checks of ``--write``: they write the bytes that they have just read, and zeros to zeros.

So nothing changes, unless somebody else writes to the same place at the same moment.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import closing

from imageserver.client.checking.findings import (
    SAMPLE,
    Check,
    Differs,
    Missing,
    Subject,
    Wrong,
    require_done,
)
from imageserver.client.checking.probe import Reply, Request
from imageserver.client.http.answers import parse_fields
from imageserver.client.http.remote import digest_field

_BAD = 400
#: Refusals of a way of writing that a server need not have.
_UNSUPPORTED = {400, 405, 415, 501}
_DATA = "application/octet-stream"
#: Longest span that is zeroed, in bytes.
_ZEROED = 1 << 20
#: Bytes that are written in the middle of the image: no multiple of any block.
_INSIDE = 4097
#: Bytes before and behind a written span that are compared as well.
_MARGIN = 512

#: Half-open bytes of the image.
Span = tuple[int, int]


def _needs_range_writes(subject: Subject) -> None:
    if not subject.abilities.writes_ranges:
        raise Missing("parts of this image cannot be written")
    subject.needs_bytes()


def _end(subject: Subject) -> Span:
    _needs_range_writes(subject)
    return max(0, subject.size - SAMPLE), subject.size


def _inside(subject: Subject) -> Span:
    """Return a span with odd ends, among data: zeros in the wrong place would not be seen."""
    _needs_range_writes(subject)
    begin = subject.size // 2
    if subject.abilities.has("extents"):
        with closing(subject.extents("zero")) as extents:
            data = (extent[0] for extent in extents if not extent[2] and extent[1] > _INSIDE)
            begin = next(data, begin)
    start = begin | 1
    return (start, min(start + _INSIDE, subject.size)) if start < subject.size else _end(subject)


def _content_range(start: int, stop: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{stop - 1}/*", "Content-Type": _DATA}


def _rewritten(subject: Subject, span: Span, write: Callable[[bytes], Reply]) -> Reply:
    """Write the bytes of a span again; return the answer, once the image is found as it was."""
    before, data = _around(subject, *span)
    reply = write(data)
    _check_written(subject, reply, span, before)
    return reply


def _put(subject: Subject, span: Span, query: str) -> Reply:
    headers = _content_range(*span)
    return _rewritten(subject, span, lambda data: subject.ask(Request("PUT", query, headers, data)))


def _written_end(subject: Subject) -> str:
    _put(subject, span := _end(subject), "?flush=n")
    return _shown(span)


def _written_inside(subject: Subject) -> str:
    _put(subject, span := _inside(subject), "?flush=n")
    return _shown(span)


def _shown(span: Span) -> str:
    return f"{span[1] - span[0]} bytes at {span[0]}"


def _around(subject: Subject, start: int, stop: int) -> tuple[bytes, bytes]:
    """Return what lies in a span and around it, and in it alone."""
    first = max(0, start - _MARGIN)
    before = subject.bytes_at(first, min(stop + _MARGIN, subject.size))
    return before, before[start - first : stop - first]


def _check_written(subject: Subject, reply: Reply, span: Span, before: bytes) -> None:
    require_done(reply)
    if _around(subject, *span)[0] != before:
        raise Wrong(f"other bytes are read at {span[0]} than were written")
    if subject.remote_size() != subject.size:
        raise Wrong("the image has another size now")


def _patched(subject: Subject) -> str:
    start, stop = span = _inside(subject)
    headers = {"Range": f"bytes={start}-{stop - 1}", "Content-Type": _DATA}

    def patch(data: bytes) -> Reply:
        reply = subject.ask(Request("PATCH", headers=headers, body=data))
        if reply.status in _UNSUPPORTED:
            raise Missing(f"status {reply.status}")
        return reply

    _rewritten(subject, span, patch)
    return _shown(span)


def _flushed(subject: Subject) -> str:
    reply = _put(subject, _inside(subject), "?flush=y")
    flushed = parse_fields(reply.body or b"").get("flushed")
    if flushed is None:
        raise Differs("the answer does not say whether it was flushed")
    if flushed is not subject.abilities.has("flush"):
        raise Wrong(f"flushed is {flushed}")
    return f"the answer says {json.dumps(flushed)}"


def _digested(subject: Subject) -> str:
    subject.needs("digest")
    span = _inside(subject)

    def put(data: bytes, told: bytes) -> Reply:
        headers = _content_range(*span) | digest_field(hashlib.sha256(told).digest())
        return subject.ask(Request("PUT", "?flush=n", headers, data))

    _rewritten(subject, span, lambda data: put(data, data))
    before, data = _around(subject, *span)
    reply = put(data, data + b"more")
    if reply.status != _BAD:
        raise Wrong(f"status {reply.status} for bytes that are not those of their digest")
    if _around(subject, *span)[0] != before:
        raise Wrong(f"other bytes are read at {span[0]} than were written")
    return "a right one is taken, a wrong one refused"


def _zeroed(subject: Subject) -> str:
    subject.needs("zero")
    subject.needs_bytes()
    with closing(subject.extents("zero")) as extents:
        found = next((extent for extent in extents if extent[2]), None)
    if found is None:
        raise Missing("no part of the image is zero, so nothing was tried")
    start, stop = span = found[0], found[0] + min(found[1], _ZEROED)
    before, data = _around(subject, start, stop)
    if any(data):
        raise Wrong(f"bytes {start} to {stop} are said to be zero and are not")
    command = {"op": "zero", "offset": start, "size": stop - start}
    headers = {"Content-Type": "application/json"}
    reply = subject.ask(Request("PATCH", headers=headers, body=json.dumps(command).encode()))
    _check_written(subject, reply, span, before)
    return f"{_shown(span)}, which were zero"


def _expected(subject: Subject) -> str:
    span = _inside(subject)

    def put(data: bytes) -> Reply:
        headers = _content_range(*span)
        return subject.ask_by(lambda connection: connection.ask_expecting("PUT", headers, data))

    reply = _rewritten(subject, span, put)
    if not reply.continued:
        raise Differs("the body was not asked for")
    return "100 Continue, then the body"


def _expected_refused(subject: Subject) -> str:
    """A write to an image that nobody knows: nothing can come of it."""
    with subject.connection(to_unknown_id=True) as connection:
        reply = connection.ask_expecting("PUT", _content_range(0, SAMPLE), bytes(SAMPLE))
    if reply.status < _BAD:
        raise Wrong(f"status {reply.status} for an id that nobody knows")
    if reply.continued:
        raise Differs(f"a body is asked for, and then refused with {reply.status}")
    return f"{reply.status}, and no body asked for"


WRITE_CHECKS = (
    Check("write at the end", _written_end),
    Check("write inside", _written_inside),
    Check("write with PATCH", _patched),
    Check("write and flush", _flushed),
    Check("write with a digest", _digested),
    Check("zero what is zero", _zeroed),
    Check("Expect: 100-continue", _expected),
    Check("Expect, refused", _expected_refused),
)
