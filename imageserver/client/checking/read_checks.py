# SPDX-License-Identifier: Apache-2.0
"""The checks that change nothing: one function for each promise of docs/api.md, in one table."""

import contextlib
import hashlib
import json

from imageserver.client.checking.extent_checks import EXTENT_CHECKS
from imageserver.client.checking.findings import (
    SAMPLE,
    Check,
    Differs,
    Missing,
    Subject,
    Wrong,
    partial,
    require_done,
)
from imageserver.client.checking.probe import Request
from imageserver.client.showing.units import size_text

#: Bytes of each of several reads at once: more than buffers take, so that the reads overlap.
_LARGE = 8 << 20
#: Most connections that are opened at once.
_MOST_CONNECTIONS = 32
_OK, _PARTIAL, _BAD, _UNSATISFIABLE, _FAILED = 200, 206, 400, 416, 500


# Announcements


def _options(subject: Subject) -> str:
    reply = subject.ask(Request("OPTIONS"))
    fields = json.loads(reply.body or b"{}")
    names = ("unix_socket", "features", "max_readers", "max_writers")
    lacking = [name for name in names if name not in fields]
    if "Allow" not in reply.headers:
        lacking.append("Allow")
    if lacking:
        raise Differs(f"without {', '.join(lacking)}")
    return ", ".join(sorted(subject.abilities.features)) or "no features"


def _head(subject: Subject) -> str:
    reply = subject.ask(Request("HEAD"))
    if reply.status in {400, 404, 405, 501}:
        raise Missing(f"status {reply.status}")
    if reply.status != _OK or reply.headers.get("Content-Length") != str(subject.size):
        raise Wrong(f"status {reply.status}, length {reply.headers.get('Content-Length')}")
    return f"{subject.size} bytes"


# Ranges


def _first_and_last(subject: Subject) -> str:
    subject.needs_bytes()
    size, length = subject.size, min(SAMPLE, subject.size)
    head, tail = subject.bytes_at(0, length), subject.bytes_at(size - length, size)
    same = (subject.bytes_at(0, 1), subject.bytes_at(size - 1, size)) == (head[:1], tail[-1:])
    if not same:
        raise Wrong("the first or last byte is another when asked for alone")
    return "the same bytes in every cut"


def _open_ended(subject: Subject) -> str:
    subject.needs_bytes()
    start = max(0, subject.size - SAMPLE)
    found = partial(subject.range(f"{start}-"), start, subject.size, subject.size)
    if found != subject.bytes_at(start, subject.size):
        raise Wrong("other bytes than asked for with an end")
    return f"the last {size_text(len(found))}"


def _suffix(subject: Subject) -> str:
    subject.needs_bytes()
    length = min(SAMPLE, subject.size)
    reply = subject.range(f"-{length}")
    if reply.status in {400, _UNSATISFIABLE, 501}:
        raise Missing(f"status {reply.status}")
    start = subject.size - length
    if partial(reply, start, subject.size, subject.size) != subject.bytes_at(start, subject.size):
        raise Wrong("other bytes than the last")
    return f"the last {size_text(length)}"


def _clipped(subject: Subject) -> str:
    subject.needs_bytes()
    start = max(0, subject.size - 512)
    reply = subject.range(f"{start}-{subject.size + 511}")
    if reply.status == _UNSATISFIABLE:
        raise Differs("a range that ends beyond the image is 416, not clipped")
    partial(reply, start, subject.size, subject.size)
    return "a range that ends beyond the image is clipped"


def _beyond(subject: Subject) -> str:
    reply = subject.range(f"{subject.size}-{subject.size}")
    if reply.status != _UNSATISFIABLE:
        raise Wrong(f"status {reply.status}, not 416")
    if reply.headers.get("Content-Range") != f"bytes */{subject.size}":
        raise Differs("416 without the size in Content-Range")
    return "416 with the size"


_MALFORMED = ("bytes=x-y", "bytes=0-0,2-2", "bytes=0", "lines=0-0", "bytes=--1", "bytes=-0")


def _malformed(subject: Subject) -> str:
    subject.needs_bytes()
    found = {
        text: subject.ask(Request("GET", headers={"Range": text})).status for text in _MALFORMED
    }
    odd = {text: status for text, status in found.items() if status != _BAD}
    if any(status >= _FAILED for status in odd.values()):
        raise Wrong("; ".join(f"{text}: {status}" for text, status in odd.items()))
    if odd:
        raise Differs("; ".join(f"{text}: {status}" for text, status in odd.items()))
    return "400 for each of six"


def _if_range(subject: Subject) -> str:
    subject.needs_bytes()
    headers = {"Range": "bytes=0-0", "If-Range": '"imagectl"'}
    reply = subject.ask(Request("GET", headers=headers))
    if reply.status == _OK and reply.headers.get("Content-Length") == str(subject.size):
        return "never matches: the whole image"
    raise Differs(f"status {reply.status}: a part of what may be another image")


def _conditions(subject: Subject) -> str:
    subject.needs_bytes()
    for name, value in (
        ("If-None-Match", '"imagectl"'),
        ("If-Modified-Since", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ):
        reply = subject.ask(Request("GET", headers={"Range": "bytes=0-0", name: value}))
        if reply.status != _PARTIAL:
            raise Wrong(f"status {reply.status} with {name}")
    return "conditions that hold change nothing"


# Connections


def _keep_alive(subject: Subject) -> str:
    subject.needs_bytes()
    with subject.connection() as connection:
        for number in range(3):
            reply = connection.ask(Request("GET", headers={"Range": "bytes=0-0"}))
            partial(reply, 0, 1, subject.size)
            closes = reply.headers.get("Connection", "").lower() == "close"
            if closes or connection.ask(Request("OPTIONS")).status >= _BAD:
                raise Differs(f"the connection is closed after request {number + 1}")
    return "six requests on one connection"


def _connections(subject: Subject) -> str:
    subject.needs_bytes()
    most = subject.abilities.max_readers
    if not most:
        raise Missing("max_readers is not told")
    wanted, length = min(most, _MOST_CONNECTIONS), min(_LARGE, subject.size)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(subject.connection()) for _ in range(wanted)]
        for connection in opened:
            connection.send(Request("GET", headers={"Range": f"bytes=0-{length - 1}"}))
        statuses = [connection.receive().status for connection in opened]
    served = statuses.count(_PARTIAL)
    if served == wanted:
        return f"{wanted} reads at once"
    if set(statuses) <= {_PARTIAL, 503}:
        raise Differs(f"{served} of {wanted} reads at once were served: do others read now?")
    raise Wrong(f"statuses {sorted(set(statuses))}")


# Checksums


def _checksum(subject: Subject) -> str:
    subject.needs("checksum")
    subject.needs_bytes()
    length = min(SAMPLE, subject.size)
    told = subject.checksum(length)
    if told is None:
        raise Differs("of whole images, not of spans")
    block = hashlib.sha256(subject.bytes_at(0, length)).digest()
    if told != hashlib.sha256(block).hexdigest():
        raise Wrong(f"the first {size_text(length)} have another")
    return f"that of the first {size_text(length)}"


# Errors and flush


def _errors(subject: Subject) -> str:
    with subject.connection(to_unknown_id=True) as connection:
        reply = connection.ask(Request("GET"))
    if reply.status < _BAD:
        raise Wrong(f"status {reply.status} for an id that nobody knows")
    if reply.status != 404 or not reply.error:  # noqa: PLR2004 - docs/api.md
        kind = reply.headers.get("Content-Type", "no type")
        raise Differs(f"an unknown id is {reply.status} ({kind})")
    return f"404, {reply.error!r}"


def _methods(subject: Subject) -> str:
    reply = subject.ask(Request("PROPFIND"))
    if reply.status == 405 and "Allow" in reply.headers:  # noqa: PLR2004 - RFC 9110
        return "405 with Allow"
    if 400 <= reply.status < 500 or reply.status == 501:  # noqa: PLR2004 - RFC 9110
        raise Differs(f"status {reply.status} for a method that it lacks, without Allow")
    raise Wrong(f"status {reply.status} for a method that it lacks")


def _flush(subject: Subject) -> str:
    subject.needs("flush")
    if "POST" in subject.abilities.methods:
        reply = subject.ask(Request("POST", "/flush", body=b""))
    else:
        headers = {"Content-Type": "application/json"}
        reply = subject.ask(Request("PATCH", headers=headers, body=b'{"op":"flush"}'))
    require_done(reply)
    return "done"


CHECKS = (
    Check("OPTIONS", _options),
    Check("HEAD", _head),
    Check("first and last bytes", _first_and_last),
    Check("range without an end", _open_ended),
    Check("range of the last bytes", _suffix),
    Check("range across the end", _clipped),
    Check("range beyond the end", _beyond),
    Check("malformed ranges", _malformed),
    Check("If-Range", _if_range),
    Check("conditions", _conditions),
    Check("keep-alive", _keep_alive),
    Check("several connections", _connections),
    *EXTENT_CHECKS,
    Check("checksum", _checksum),
    Check("unknown id", _errors),
    Check("unknown method", _methods),
    Check("flush", _flush),
)
