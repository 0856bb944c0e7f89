# SPDX-License-Identifier: Apache-2.0
"""From a client's body into a file: received on the request's thread, written on another.

Both release the interpreter while they copy, so they overlap (``backends/ring``).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue

from imageserver.backends.ring import Ring, Side, fill
from imageserver.core.errors import ShortBody
from imageserver.core.sources import Source

#: Buffers of a copy: one being received, one being written, one to spare.
_DEPTH = 3

#: Writes all of a piece at an offset, from 0, of what is copied; on the thread that writes.
Write = Callable[[memoryview, int], None]


def copy(length: int, source: Source, write: Write, *, chunk: int, owner: object) -> Iterator[int]:
    """Receive ``length`` bytes and write them in order; yield running totals written.

    The last total is ``length``. ``owner`` is the image (``Ring``). Raises what ``write`` does.

    Raises:
        ShortBody: the source ended early.
    """
    copy_pieces = _copy_here if length <= chunk else _copy_behind
    with Ring(min(_DEPTH, 1 + length // chunk), chunk, owner) as ring:
        yield from copy_pieces(length, source, write, ring)


def _copy_here(length: int, source: Source, write: Write, ring: Ring) -> Iterator[int]:
    """Copy what fits into one buffer: there a thread costs more than it saves."""
    if not length or (buffer := ring.take(wait=False)) is None:
        return
    view = memoryview(buffer)[:length]
    received = fill(source, view, ring)
    if received < length:
        raise ShortBody(received)
    write(view, 0)
    ring.give(buffer)
    yield length


def _copy_behind(length: int, source: Source, write: Write, ring: Ring) -> Iterator[int]:
    filled: SimpleQueue[tuple[bytearray, int, int] | None] = SimpleQueue()
    written: SimpleQueue[int] = SimpleQueue()

    def work() -> None:
        while (item := filled.get()) is not None:
            buffer, size, offset = item
            write(memoryview(buffer)[:size], offset)
            written.put(offset + size)
            ring.give(buffer)

    def stopping() -> AbstractContextManager[object]:
        filled.put(None)
        return nullcontext()

    with Side(work, ended=ring.close, stopping=stopping) as side:
        at = 0
        while at < length and (buffer := ring.take(wait=True)) is not None:
            size = min(len(buffer), length - at)
            received = fill(source, memoryview(buffer)[:size], ring)
            if received < size:
                if ring.is_closed:
                    break  # writing has failed
                raise ShortBody(at + received)
            filled.put((buffer, size, at))
            at += size
            while not written.empty():
                yield written.get()
        filled.put(None)
        side.finish()
        while not written.empty():
            yield written.get()
