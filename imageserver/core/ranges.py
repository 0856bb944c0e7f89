# SPDX-License-Identifier: Apache-2.0
"""Byte ranges: from a ``Range`` header to a half-open span of an image.

Grammar (RFC 9110 section 14.1.2), one range only and nothing lenient, because a client
whose bad range is ignored reads the wrong bytes and does not notice:

    Range          = "bytes=" ( first-pos "-" [ last-pos ] / "-" suffix-length )
    first-pos, last-pos, suffix-length = 1*DIGIT

The header is inclusive, everything behind it is half-open. Parsing knows no image size;
``resolve`` brings the size in, so that a malformed header is refused before the image is opened.
"""

import re
from typing import NamedTuple

from imageserver.core.bounds import cut_short
from imageserver.core.errors import BadRequest, RangeOutsideImage

# RFC 9110 section 14.1: units are case-insensitive. [0-9], for \d takes other scripts' digits.
_RANGE = re.compile(
    r"bytes=(?:(?P<first>[0-9]+)-(?P<last>[0-9]+)?|-(?P<suffix>[0-9]+))", re.IGNORECASE | re.ASCII
)


class Span(NamedTuple):
    """Bytes ``start`` up to but excluding ``stop`` of an image of ``size`` bytes."""

    start: int
    stop: int
    size: int

    @property
    def length(self) -> int:
        """Number of bytes."""
        return self.stop - self.start

    @property
    def content_range(self) -> str:
        """The ``Content-Range`` value of a 206 answer (RFC 9110 section 14.4)."""
        return f"bytes {self.start}-{self.stop - 1}/{self.size}"


def whole(size: int) -> Span:
    """Return the span of a whole image of ``size`` bytes."""
    return Span(0, size, size)


class ByteRange(NamedTuple):
    """One range: ``first`` to ``last`` inclusive (None: to the end), or the last ``suffix``."""

    first: int = 0
    last: int | None = None
    suffix: int | None = None

    def resolve(self, size: int) -> Span:
        """Clip this range to an image of ``size`` bytes.

        Raises:
            RangeOutsideImage: the range begins beyond the end, ends before it begins, or
                is a suffix of an empty image.
        """
        if self.suffix is not None:
            first, last = max(0, size - self.suffix), size - 1
        else:
            first = self.first
            last = size - 1 if self.last is None else min(self.last, size - 1)
        if first >= size or (self.last is not None and self.last < first):
            raise RangeOutsideImage(size)
        return Span(first, last + 1, size)


def parse_range(header: str) -> ByteRange:
    """Parse the value of a ``Range`` header.

    Raises:
        BadRequest: several ranges, another unit, ``-0``, or anything malformed.
    """
    match = _RANGE.fullmatch(header.strip(" \t"))
    if match is None:
        raise BadRequest("invalid Range header")
    first, last, suffix = match.groups()
    if suffix is None:
        return ByteRange(cut_short(first), None if last is None else cut_short(last))
    if cut_short(suffix) == 0:
        raise BadRequest("invalid Range header")
    return ByteRange(suffix=cut_short(suffix))


_CONTENT_RANGE = re.compile(
    r"bytes (?P<first>[0-9]+)-(?P<last>[0-9]+|\*)/(?P<size>[0-9]+|\*)", re.IGNORECASE | re.ASCII
)


class ContentRange(NamedTuple):
    """Where a body belongs (docs/api.md): ``length`` bytes from ``first``, of ``size`` if said."""

    first: int
    length: int
    size: int | None

    def resolve(self, size: int) -> Span:
        """Place this range in an image of ``size`` bytes; nothing is clipped.

        Raises:
            RangeOutsideImage: it does not lie inside.
            BadRequest: the header states another size.
        """
        if self.size is not None and self.size != size:
            raise BadRequest(f"Content-Range size ({self.size}) must equal image size ({size})")
        if self.first + self.length > size:
            raise RangeOutsideImage(size)
        return Span(self.first, self.first + self.length, size)


def parse_content_range(header: str, length: int) -> ContentRange:
    """Parse the ``Content-Range`` of a body of ``length`` bytes.

    ``bytes S-E/*`` and ``bytes S-E/SIZE`` are RFC 9110 section 14.4; ``bytes S-*/*`` is what
    oVirt's clients send when the length stands in ``Content-Length`` alone.

    Raises:
        BadRequest: it is malformed, or the body is empty or of another length.
    """
    match = _CONTENT_RANGE.fullmatch(header.strip(" \t"))
    if match is None:
        raise BadRequest("invalid Content-Range header")
    if length == 0:
        raise BadRequest("Content-Length must be positive")
    first = cut_short(match["first"])
    if match["last"] != "*":
        wanted = cut_short(match["last"]) - first + 1
        if wanted <= 0:
            raise BadRequest("invalid Content-Range header")
        if wanted != length:
            raise BadRequest(f"Content-Length ({length}) must equal range length ({wanted})")
    size = None if match["size"] == "*" else cut_short(match["size"])
    return ContentRange(first, length, size)


_DECIMAL = re.compile(r"[0-9]+")


def parse_position(text: str) -> int | None:
    """Parse a place in an image, or a number of its bytes; None where it is no plain decimal.

    It may lie beyond the end of every image.
    """
    return cut_short(text) if _DECIMAL.fullmatch(text) else None


def parse_length(header: str | None) -> int:
    """Parse a ``Content-Length`` (RFC 9110 section 8.6) into bytes.

    Raises:
        BadRequest: it is missing or not a plain decimal number. The number has no bound but that
            of ``cut_short``: whoever takes the body knows what it may be.
    """
    if header is None or header == "":
        raise BadRequest("Content-Length required")
    length = parse_position(header)
    if length is None:
        raise BadRequest("Invalid Content-Length")
    return length
