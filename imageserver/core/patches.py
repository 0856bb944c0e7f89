# SPDX-License-Identifier: Apache-2.0
"""The JSON bodies of PATCH: from bytes to ``Zero`` or ``Flush``.

Checks run in the order of the messages in docs/api.md: size, offset, flush. Integers and
booleans are JSON's own: ``true`` is no number, ``1.0`` is no integer, ``"1"`` is neither.
"""

from dataclasses import dataclass
from functools import lru_cache

from imageserver.core.errors import BadRequest
from imageserver.core.jsontext import InvalidJson, parse_json
from imageserver.core.ranges import Span

#: Largest JSON body, in bytes.
MAX_PATCH_SIZE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Zero:
    """Zero ``size`` bytes from ``offset``, then flush if asked to."""

    offset: int
    size: int
    flush: bool

    def resolve(self, image_size: int) -> Span:
        """Clip to an image of ``image_size`` bytes.

        Raises:
            BadRequest: the offset lies at or beyond the image's end.
        """
        if self.offset >= image_size:
            raise BadRequest("offset must be less than image size")
        return Span(self.offset, min(self.offset + self.size, image_size), image_size)


@dataclass(frozen=True, slots=True)
class Flush:
    """Bring the image's data to stable storage."""


@lru_cache(maxsize=8)  # one flush is like another, byte by byte
def parse_patch(body: bytes) -> Zero | Flush:
    """Parse a JSON PATCH body.

    Raises:
        BadRequest: with the message of docs/api.md for what is wrong.
    """
    try:
        fields = parse_json(body)
    except InvalidJson as exc:
        raise BadRequest(f"invalid JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise BadRequest("body must be a JSON object")
    match fields.get("op"):
        case "zero":
            return _zero(fields)
        case "flush":
            return Flush()
    raise BadRequest('unsupported op; only "zero" and "flush" are supported')


def _zero(fields: dict[str, object]) -> Zero:
    size = fields.get("size")
    if type(size) is not int:
        raise BadRequest('missing or invalid "size"')
    if size <= 0:
        raise BadRequest('"size" must be positive')
    offset = fields.get("offset", 0)
    if type(offset) is not int:
        raise BadRequest('invalid "offset"')
    if offset < 0:
        raise BadRequest('"offset" must be non-negative')
    flush = fields.get("flush", False)
    if type(flush) is not bool:
        raise BadRequest('invalid "flush"')
    return Zero(offset, size, flush)
