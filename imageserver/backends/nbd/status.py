# SPDX-License-Identifier: Apache-2.0
"""Block status, asked for in the largest steps and in whole blocks, as extents."""

from collections.abc import Generator

from imageserver.backends.nbd.link import Link
from imageserver.core import extents
from imageserver.core.errors import BackendError
from imageserver.core.extents import Extent, Merger, Reply

#: Lengths are 32 bits on the wire, and a request ends at a block (at most 64 KiB, NBD protocol).
_MAX_LENGTH = (1 << 32) - (1 << 16)


def list_extents(
    link: Link, bitmap: str | None, start: int, stop: int, *, dirty: bool
) -> Generator[list[Extent]]:
    """Yield the extents of [start, stop): see ``ports.Backend``."""
    allocation = link.has_context(extents.ALLOCATION)
    context = other_context(link, bitmap, dirty=dirty)
    everywhere = int(dirty and not context)
    merger = Merger(start)
    while (at := merger.position) < stop:
        limit = stop - at
        replies = _ask(link, at, stop) if allocation or context else {}
        try:
            state = replies[extents.ALLOCATION] if allocation else Reply((limit,), (0,))
            if context:
                other = replies[context] if dirty else replies[context].holes()
                pieces = extents.union_pieces(state, other, limit)
            else:
                pieces = extents.allocation_pieces(state, limit, everywhere)
        except KeyError as exc:
            raise BackendError(f"the server left out the status of {exc}") from exc
        yield list(merger.add(pieces))
        if merger.position == at:
            raise BackendError("the server's block status makes no progress")
    yield list(merger.finish())


def other_context(link: Link, bitmap: str | None, *, dirty: bool) -> str:
    """Return what besides zeros the server tells of: what is dirty, or a hole; "": nothing."""
    context = extents.DEPTH
    if dirty:
        context = extents.dirty_context(bitmap) if bitmap else ""
    return context if link.has_context(context) else ""


def _ask(link: Link, start: int, stop: int) -> dict[str, Reply]:
    """Ask for as much of [start, stop) as a request may cover, from and to whole blocks."""
    first = start // link.align * link.align
    last = min(-(-stop // link.align) * link.align, link.size)
    replies: dict[str, Reply] = {}
    link.wait(link.block_status(first, min(last - first, _MAX_LENGTH), replies))
    if first == start:
        return replies
    return {context: reply.after(start - first) for context, reply in replies.items()}
