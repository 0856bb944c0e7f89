# SPDX-License-Identifier: Apache-2.0
"""What a server's answers say, parsed and checked: abilities, sizes, ranges. No I/O.

An answer is accepted only if its head proves it right: a range must come as 206, name exactly
the range that was asked for, and have a length.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from imageserver.client.failures import Different, Failed
from imageserver.client.http.extent_list import MAX_SIZE

#: Numbers have no more digits than the largest size.
_CONTENT_RANGE = re.compile(
    r"bytes (?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19}|\*)", re.IGNORECASE
)
_HEX = re.compile(r"[0-9a-f]{16,128}")


@dataclass(frozen=True, slots=True)
class Abilities:
    """What OPTIONS says; without limits in it, one reader and one writer are assumed."""

    features: frozenset[str]
    max_readers: int
    max_writers: int
    unix_socket: str | None
    methods: frozenset[str]

    def has(self, feature: str) -> bool:
        """Tell whether ``feature`` is announced: ``extents``, ``zero`` and so on."""
        return feature in self.features

    @property
    def writes_ranges(self) -> bool:
        """Whether parts of the image can be written; imageserver replaces a file as a whole."""
        return "PATCH" in self.methods


def parse_bitmap(headers: Mapping[str, str]) -> str | None:
    """Return the bitmap that dirty extents rest on; "": there is none. None: it is not said."""
    said = headers.get("Image-Dirty-Bitmap")
    return "" if said == "none" else said and unquote(said)


def parse_abilities(body: bytes, allow: str) -> Abilities:
    """Parse the answer to OPTIONS; a feature that it does not name is not offered."""
    try:
        fields = json.loads(body or b"{}")
    except (ValueError, RecursionError) as exc:
        raise Failed("OPTIONS was not answered in JSON: this is no image server") from exc
    if not isinstance(fields, dict):
        raise Failed("OPTIONS was not answered with a JSON object: this is no image server")
    features, sock = fields.get("features"), fields.get("unix_socket")
    return Abilities(
        features=frozenset(map(str, features)) if isinstance(features, list) else frozenset(),
        max_readers=_count(fields.get("max_readers")),
        max_writers=_count(fields.get("max_writers")),
        unix_socket=sock if isinstance(sock, str) else None,
        methods=frozenset(m.strip().upper() for m in allow.split(",") if m.strip()),
    )


def _count(value: object) -> int:
    return value if type(value) is int and value >= 0 else 1


def parse_size(digits: str) -> int:
    """Return a size in bytes."""
    if len(digits) > len(str(MAX_SIZE)) or int(digits) > MAX_SIZE:
        raise Failed("the server tells a size that no image has")
    return int(digits)


def range_size(headers: Mapping[str, str]) -> int:
    """Return the size of the image that ``Content-Range`` tells, in bytes."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if match is None or match[3] == "*":
        raise Failed("the server does not tell how large the image is")
    return parse_size(match[3])


def check_range(headers: Mapping[str, str], start: int, stop: int, size: int | None = None) -> None:
    """Require the head of a 206 to announce exactly this range; of an image of ``size`` bytes.

    Raises:
        Different: the image has another size by now.
        Failed: it does not, or its end cannot be known.
    """
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if headers.get("Content-Type", "").lower().startswith("multipart/"):
        raise Failed("the server answered one range with several parts")
    if match is None or match[1] is None:
        raise Failed("the server answered with a range, but does not say which")
    if (int(match[1]), int(match[2]) + 1) != (start, stop):
        raise Failed("the server answered with another range: has the image become smaller?")
    if match[3] != "*" and int(match[3]) < stop:
        raise Failed("the server answered with a range that ends beyond its image")
    if match[3] != "*" and size not in {None, int(match[3])}:
        raise Different(f"the image had {size} bytes, and has {match[3][:20]}, as its server says")
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise Failed("the server answered with an encoding that was not asked for")
    length = headers.get("Content-Length")
    if length is None:
        raise Failed(f"the server answered {stop - start} bytes without a Content-Length")
    if length != str(stop - start) or "Transfer-Encoding" in headers:
        raise Failed(f"the server answered {stop - start} bytes with {length[:20]}")


def parse_checksum(body: bytes, algorithm: str, block_size: int | None) -> str:
    """Return the hex of a checksum that is what was asked for.

    Raises:
        Failed: it is not.
    """
    fields = parse_fields(body)
    found = fields.get("checksum")
    if not isinstance(found, str) or not _HEX.fullmatch(found):
        raise Failed("the server does not say what the checksum is")
    if (fields.get("algorithm"), fields.get("block_size")) != (algorithm, block_size):
        raise Failed("the server has computed another checksum than was asked for")
    return found


def parse_fields(body: bytes) -> dict[str, Any]:
    """Return the fields of an answer; none where it is no JSON object."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
