# SPDX-License-Identifier: Apache-2.0
"""What headers and query parameters say, parsed once: lengths, ranges, media types."""

from collections.abc import Sequence

import falcon

from imageserver.core.digests import Expected, parse_digest
from imageserver.core.errors import BadRequest, MethodNotAllowed
from imageserver.core.patches import MAX_PATCH_SIZE
from imageserver.core.ranges import ByteRange, parse_length, parse_position, parse_range


def read_range(req: falcon.Request) -> ByteRange | None:
    """Return the range that a GET asks for, whatever state the image is in; None: the whole.

    With ``If-Range`` the image must be open to tell: see ``image_resource``.
    """
    header = req.env.get("HTTP_RANGE")
    if header is None or "HTTP_IF_RANGE" in req.env:
        return None
    return parse_range(header)


def read_span(req: falcon.Request) -> ByteRange | None:
    """Return the span that ``?start=S&length=L`` asks for; None for the whole image."""
    first, size = read_parameter(req, "start"), read_parameter(req, "length")
    if first is None and size is None:
        return None
    if size is None:
        return ByteRange(first or 0)
    if size == 0:
        raise BadRequest('"length" must be positive')
    return ByteRange(first or 0, (first or 0) + size - 1)


def read_parameter(req: falcon.Request, name: str) -> int | None:
    """Return the number of bytes that a query parameter states; None where it is absent."""
    values = req.get_param_as_list(name)
    if values is None:
        return None
    position = parse_position(values[0]) if len(values) == 1 else None
    if position is None:
        raise BadRequest(f'invalid "{name}": it must be a number of bytes')
    return position


def read_flush(req: falcon.Request) -> bool | None:
    """Return what ``?flush=y|n`` asks for; None where it is absent (docs/api.md)."""
    return _read_y_or_n(req, "flush")


def read_close(req: falcon.Request) -> bool:
    """Tell whether ``?close=y`` asks for the connection's end (docs/api.md)."""
    return bool(_read_y_or_n(req, "close"))


def _read_y_or_n(req: falcon.Request, name: str) -> bool | None:
    if not req.query_string:
        return None  # most requests, at once
    values = req.get_param_as_list(name)
    if values is None:
        return None
    if values not in (["y"], ["n"]):
        raise BadRequest(f'invalid "{name}": it must be y or n')
    return values == ["y"]


def full_body_length(req: falcon.Request) -> int:
    """Return the length of a body that is a whole image, in bytes."""
    if "HTTP_RANGE" in req.env or "HTTP_CONTENT_RANGE" in req.env:
        raise BadRequest("Range/Content-Range not supported; full writes only")
    return body_length(req)


def body_length(req: falcon.Request) -> int:
    """Return the body's announced length. A chunked body announces none."""
    if "HTTP_TRANSFER_ENCODING" in req.env:
        raise BadRequest("Content-Length required")
    return parse_length(req.env.get("CONTENT_LENGTH"))


def json_length(req: falcon.Request) -> int:
    """Return the length of a JSON body, 1 byte to 64 KiB."""
    try:
        length = body_length(req)
    except BadRequest as exc:
        raise BadRequest("Invalid Content-Length") from exc
    if not 1 <= length <= MAX_PATCH_SIZE:
        raise BadRequest("Invalid Content-Length")
    return length


def read_digests(req: falcon.Request, *, is_whole: bool) -> Sequence[Expected]:
    """Return what the body is expected to be (RFC 9530): nothing, where no field says it.

    ``Repr-Digest`` is about the whole image, so that it says nothing of a part.
    """
    if "HTTP_CONTENT_DIGEST" not in req.env and "HTTP_REPR_DIGEST" not in req.env:
        return ()  # most requests, at once
    names = ("Content-Digest", "Repr-Digest") if is_whole else ("Content-Digest",)
    found = ((name, req.get_header(name)) for name in names)
    digests = (parse_digest(name, value) for name, value in found if value is not None)
    return [each for each in digests if each]


def is_json(req: falcon.Request) -> bool:
    """Tell whether the body's media type is JSON; case and parameters do not matter."""
    media_type = (req.content_type or "").partition(";")[0]
    return media_type.strip(" \t").lower() == falcon.MEDIA_JSON


def check_method(method: str, allowed: tuple[str, ...]) -> None:
    """Refuse a method that a resource lacks, naming those it has."""
    if method not in allowed:
        raise MethodNotAllowed(allowed)
