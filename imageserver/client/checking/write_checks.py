# SPDX-License-Identifier: Apache-2.0
"""The checks of ``--write``: they write the bytes that they have just read, and zeros to zeros.

So nothing changes, unless somebody else writes to the same place at the same moment.
"""

import json
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


def _needs_range_writes(subject: Subject) -> None:
    if not subject.abilities.writes_ranges:
        raise Missing("parts of this image cannot be written")
    subject.needs_bytes()


def _end(subject: Subject) -> tuple[int, int]:
    return max(0, subject.size - SAMPLE), subject.size


def _inside(subject: Subject) -> tuple[int, int]:
    """Return a span with odd ends, among data: zeros in the wrong place would not be seen."""
    begin = subject.size // 2
    if subject.size and subject.abilities.has("extents"):
        with closing(subject.extents("zero")) as extents:
            data = (extent[0] for extent in extents if not extent[2] and extent[1] > _INSIDE)
            begin = next(data, begin)
    start = begin | 1
    return (start, min(start + _INSIDE, subject.size)) if start < subject.size else _end(subject)


def _content_range(start: int, stop: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {start}-{stop - 1}/*", "Content-Type": _DATA}


def _written_end(subject: Subject) -> str:
    return _put(subject, *_end(subject))


def _written_inside(subject: Subject) -> str:
    return _put(subject, *_inside(subject))


def _put(subject: Subject, start: int, stop: int) -> str:
    _needs_range_writes(subject)
    before, data = _around(subject, start, stop)
    reply = subject.ask(Request("PUT", "?flush=n", _content_range(start, stop), data))
    _check_written(subject, reply, (start, stop), before)
    return f"{stop - start} bytes at {start}"


def _around(subject: Subject, start: int, stop: int) -> tuple[bytes, bytes]:
    """Return what lies in a span and around it, and in it alone."""
    first = max(0, start - _MARGIN)
    before = subject.bytes_at(first, min(stop + _MARGIN, subject.size))
    return before, before[start - first : stop - first]


def _check_written(subject: Subject, reply: Reply, span: tuple[int, int], before: bytes) -> None:
    require_done(reply)
    if _around(subject, *span)[0] != before:
        raise Wrong(f"other bytes are read at {span[0]} than were written")
    if subject.remote_size() != subject.size:
        raise Wrong("the image has another size now")


def _patched(subject: Subject) -> str:
    _needs_range_writes(subject)
    start, stop = _inside(subject)
    before, data = _around(subject, start, stop)
    headers = {"Range": f"bytes={start}-{stop - 1}", "Content-Type": _DATA}
    reply = subject.ask(Request("PATCH", headers=headers, body=data))
    if reply.status in _UNSUPPORTED:
        raise Missing(f"status {reply.status}")
    _check_written(subject, reply, (start, stop), before)
    return f"{stop - start} bytes at {start}"


def _flushed(subject: Subject) -> str:
    _needs_range_writes(subject)
    start, stop = _inside(subject)
    before, data = _around(subject, start, stop)
    reply = subject.ask(Request("PUT", "?flush=y", _content_range(start, stop), data))
    _check_written(subject, reply, (start, stop), before)
    try:
        flushed = json.loads(reply.body or b"").get("flushed")
    except (ValueError, AttributeError):
        flushed = None
    if flushed is None:
        raise Differs("the answer does not say whether it was flushed")
    if flushed is not subject.abilities.has("flush"):
        raise Wrong(f"flushed is {flushed}")
    return f"the answer says {json.dumps(flushed)}"


def _zeroed(subject: Subject) -> str:
    subject.needs("zero")
    subject.needs_bytes()
    with closing(subject.extents("zero")) as extents:
        found = next((extent for extent in extents if extent[2]), None)
    if found is None:
        raise Missing("no part of the image is zero, so nothing was tried")
    start, stop = found[0], found[0] + min(found[1], _ZEROED)
    before, data = _around(subject, start, stop)
    if any(data):
        raise Wrong(f"bytes {start} to {stop} are said to be zero and are not")
    command = {"op": "zero", "offset": start, "size": stop - start}
    headers = {"Content-Type": "application/json"}
    reply = subject.ask(Request("PATCH", headers=headers, body=json.dumps(command).encode()))
    _check_written(subject, reply, (start, stop), before)
    return f"{stop - start} bytes at {start}, which were zero"


def _expected(subject: Subject) -> str:
    _needs_range_writes(subject)
    start, stop = _inside(subject)
    before, data = _around(subject, start, stop)
    with subject.connection() as connection:
        reply = connection.ask_expecting("PUT", _content_range(start, stop), data)
    _check_written(subject, reply, (start, stop), before)
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
    Check("zero what is zero", _zeroed),
    Check("Expect: 100-continue", _expected),
    Check("Expect, refused", _expected_refused),
)
