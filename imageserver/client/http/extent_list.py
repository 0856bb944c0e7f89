# SPDX-License-Identifier: Apache-2.0
"""A server's list of extents, parsed as it comes, and checked: in order, without gaps."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from imageserver.client.failures import Broken, Failed
from imageserver.core.extents import Extent

#: Largest size and offset: the system has them as signed 64-bit numbers.
MAX_SIZE = 2**63 - 1
#: Longest text of one extent, in bytes.
_LONGEST = 64 * 1024


def parse_extents(pieces: Iterable[bytes], context: str = "zero") -> Iterator[Extent]:
    """Parse a JSON list of flat objects as it comes, and check that it has no gaps.

    No object contains another one, so the text can be split behind any ``}``. Neighbours that
    differ only in what is ignored here (``hole``) are one extent.
    """
    rest, position, opened = b"", 0, False
    open_extent: Extent | None = None
    for piece in pieces:
        rest += piece
        end = rest.rfind(b"}") + 1
        if not end:
            if len(rest) > _LONGEST:
                raise Failed("the list of extents is no list of extents")
            continue
        batch, rest = _batch(rest[:end], first=not opened), rest[end:]
        opened = True
        for fields in batch:
            extent = _extent(fields, position, is_dirty=context == "dirty")
            position = extent[0] + extent[1]
            if open_extent is None:
                open_extent = extent
            elif open_extent[2:] == extent[2:]:
                open_extent = (open_extent[0], open_extent[1] + extent[1], *extent[2:])
            else:
                yield open_extent
                open_extent = extent
    if open_extent:
        yield open_extent
    if b"".join(rest.split()) != (b"]" if opened else b"[]"):
        raise Broken("the list of extents was cut")


def _batch(text: bytes, *, first: bool) -> list[Any]:
    text = text.lstrip()
    if text[:1] != (b"[" if first else b","):
        raise Failed("the list of extents is no JSON list")
    try:
        return json.loads(b"[" + text[1:] + b"]")  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as exc:
        raise Failed(f"the list of extents is no JSON: {exc}") from exc


def _extent(fields: Any, position: int, *, is_dirty: bool) -> Extent:  # noqa: ANN401 - JSON
    """Parse one extent: ``dirty`` must be there if it was asked for, and is ignored if not.

    A missing ``dirty`` is not taken for false, which would mean *unchanged*.
    """
    if not isinstance(fields, dict):
        raise Failed(f"an extent at {position} is no JSON object")
    start, length = fields.get("start"), fields.get("length")
    if type(start) is not int or type(length) is not int:
        raise Failed(f"an extent at {position} has no start or length")
    if start != position or length <= 0:
        raise Failed(f"the extents have a gap at {position}")
    if start + length > MAX_SIZE:
        raise Failed(f"an extent at {position} ends beyond any image")
    zero, dirty = fields.get("zero"), fields.get("dirty")
    if type(zero) is not bool:
        raise Failed(f"the extent at {position} does not tell whether it is zero")
    if is_dirty and type(dirty) is not bool:
        raise Failed(f"the extent at {position} does not tell whether it is dirty")
    return start, length, zero, is_dirty and dirty is True
