# SPDX-License-Identifier: Apache-2.0
"""The checks of ``GET /extents``: no gaps, zeros that are zeros, spans, contexts."""

import json
from collections.abc import Iterator
from itertools import pairwise

from imageserver.client.checking.findings import SAMPLE, Check, Differs, Missing, Subject, Wrong
from imageserver.client.checking.probe import Request
from imageserver.client.failures import Refused
from imageserver.client.showing.units import size_text
from imageserver.core.extents import Extent

#: Zero extents that are read, from all over the image.
_SAMPLES = 16
_BAD, _FAILED = 400, 500


def _spread(extents: Iterator[Extent]) -> tuple[list[Extent], int, int]:
    """Return some zero extents from all over, the number of extents, and where they end."""
    some: list[Extent] = []
    step, zeros, count, end = 1, 0, 0, 0
    for extent in extents:
        count, end = count + 1, extent[0] + extent[1]
        if not extent[2]:
            continue
        if zeros % step == 0:
            some.append(extent)
            if len(some) > _SAMPLES:  # every other one will do
                some, step = some[::2], 2 * step
        zeros += 1
    return some, count, end


def _extents(subject: Subject) -> str:
    subject.needs("extents")
    subject.needs_bytes()  # oVirt's daemon has no good answer about an empty image
    some, count, end = _spread(subject.extents("zero"))
    if end != subject.size:
        raise Wrong(f"they end at {end}, the image at {subject.size}")
    for start, length, _, _ in some:
        _check_zero(subject, start, start + min(length, SAMPLE))
        _check_zero(subject, start + length - min(length, SAMPLE), start + length)
    return f"{count}, without gaps; {len(some)} that are zero read so"


def _check_zero(subject: Subject, start: int, stop: int) -> None:
    if any(subject.bytes_at(start, stop)):
        raise Wrong(f"bytes {start} to {stop} are said to be zero and are not")


def _dirty(subject: Subject) -> str:
    subject.needs("extents")
    subject.needs_bytes()
    dirty = end = 0
    try:
        for start, length, _, is_dirty in subject.extents("dirty"):
            dirty, end = dirty + length * is_dirty, start + length
    except Refused as exc:
        raise Missing(f"status {exc.code}") from exc
    if end != subject.size:
        raise Wrong(f"they end at {end}, the image at {subject.size}")
    if dirty == subject.size:
        return "all is dirty: a full backup"
    return f"{size_text(dirty)} dirty"


def _spans(subject: Subject) -> str:
    subject.needs("extents")
    subject.needs_bytes()
    start, length = subject.size // 3, max(1, subject.size // 3)
    reply = subject.ask(Request("GET", f"/extents?start={start}&length={length}"))
    try:
        found = json.loads(reply.body or b"")
        bounds = [(each["start"], each["start"] + each["length"]) for each in found]
    except (ValueError, KeyError, TypeError) as exc:
        raise Missing(f"status {reply.status}") from exc
    if bounds and (bounds[0][0], bounds[-1][1]) == (0, subject.size) != (start, start + length):
        raise Missing("start and length are ignored")
    gapless = all(left[1] == right[0] for left, right in pairwise(bounds))
    if not bounds or (bounds[0][0], bounds[-1][1]) != (start, start + length) or not gapless:
        raise Wrong("the list does not cover the span that was asked for")
    return "cut to the span"


def _contexts(subject: Subject) -> str:
    subject.needs("extents")
    status = subject.ask(Request("GET", "/extents?context=imagectl")).status
    if status == _BAD:
        return "an unknown context is 400"
    if status >= _FAILED:
        raise Wrong(f"an unknown context is {status}")
    raise Differs(f"an unknown context is {status}")


EXTENT_CHECKS = (
    Check("extents", _extents),
    Check("dirty extents", _dirty),
    Check("extents of a span", _spans),
    Check("extents' context", _contexts),
)
