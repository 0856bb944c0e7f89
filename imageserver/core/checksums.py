# SPDX-License-Identifier: Apache-2.0
"""Checksums of images: which there are, and what of an image each part of one covers.

A *block hash*, as oVirt's image server and clients compute it: the hash of the digests of all
blocks, one after the other. A block that is a hole costs one digest that is known beforehand, and
blocks can be hashed side by side. A *whole* checksum is the digest of all bytes, holes included.

    extents   |  data  |hole|  data  |             hole              |
    blocks    |    data    |    data    |         two zero blocks        | rest |

Pure: ``Splitter`` cuts extents into blocks, ``Recipe`` says what each adds to the outer hash.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from imageserver.core.errors import BadRequest
from imageserver.core.extents import Extent

if TYPE_CHECKING:
    from hashlib import _Hash

DEFAULT_ALGORITHM = "blake2b"
#: oVirt's: what a client computes with the default must be what its server computes.
DEFAULT_BLOCK_SIZE = 4 << 20
MIN_BLOCK_SIZE, MAX_BLOCK_SIZE, BLOCK_ALIGN = 1 << 20, 16 << 20, 4096
#: Bytes of oVirt's digests, where the algorithm lets one choose.
_DIGEST_SIZE = 32
#: A whole checksum is computed in pieces of this many bytes, which are kept until it is their turn.
_PIECE = 1 << 20
#: Holes that are shorter are read along with the data around them, which is quicker; a cluster
#: of qcow2 is not.
_GAP = 64 << 10
#: Zero blocks that are taken together: of a block hash, which has a digest to add for each, and of
#: a whole checksum, which hashes all their bytes (0.05 to 0.25 s) before anybody can end it.
_MOST_ZERO, _MOST_ZERO_WHOLE = 1024, 64
_ZEROS = memoryview(bytes(_PIECE))

Maker = Callable[[], "_Hash"]
Read = Callable[[int, int], Generator[memoryview]]


def _block_algorithms() -> dict[str, Maker]:
    found: dict[str, Maker] = {}
    for name in sorted(hashlib.algorithms_guaranteed):
        maker = partial(hashlib.new, name, usedforsecurity=False)
        if name.startswith("blake2"):
            maker = partial(getattr(hashlib, name), digest_size=_DIGEST_SIZE)
        try:
            if maker().digest_size:  # 0: as long as one likes (SHAKE)
                found[name] = maker
        except ValueError:  # the host's policy forbids it
            continue
    return found


_BLOCK = _block_algorithms()
_WHOLE: dict[str, Maker] = {
    "whole-blake2b": partial(hashlib.new, "blake2b"),
    "whole-sha256": hashlib.sha256,
    "whole-sha512": hashlib.sha512,
}
ALGORITHMS = (*_BLOCK, *_WHOLE)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes from ``start``, of which only ``data``, spans in order, may be other than zero.

    Without data it may be several blocks.
    """

    start: int
    length: int
    data: tuple[tuple[int, int], ...] = ()


class Splitter:
    """Cuts extents, over any number of calls to ``add``, into blocks of ``size`` bytes."""

    def __init__(self, start: int, size: int, most_zero: int = _MOST_ZERO) -> None:
        """``most_zero``: how many blocks of a hole are yielded as one, at most."""
        self._size = size
        self._most_zero = most_zero
        self._start, self._filled = start, 0
        self._data: list[tuple[int, int]] = []

    def add(self, extents: Iterable[Extent]) -> Iterator[Block]:
        """Yield every block that is complete; take them to the end before the next call."""
        for start, length, zero, _ in extents:
            at, left = start, length
            while left:
                if zero and not self._filled and left >= self._size:
                    taken = min(left // self._size, self._most_zero) * self._size
                    self._start = at + taken
                    yield Block(at, taken)
                else:
                    taken = min(left, self._size - self._filled)
                    self._filled += taken
                    if not zero:
                        self._note(at, at + taken)
                    if self._filled == self._size:
                        yield from self.finish()
                at, left = at + taken, left - taken

    def _note(self, start: int, stop: int) -> None:
        if self._data and start - self._data[-1][1] < _GAP:
            start, _ = self._data.pop()
        self._data.append((start, stop))

    def finish(self) -> Iterator[Block]:
        """Yield what there is of the last block."""
        if self._filled:
            yield Block(self._start, self._filled, tuple(self._data))
            self._start, self._filled = self._start + self._filled, 0
            self._data = []


class Recipe:
    """One checksum of one image: fed with the parts of its blocks, in their order."""

    def __init__(self, algorithm: str, block_size: int | None) -> None:
        """``block_size``: in bytes, None for the default.

        Raises:
            BadRequest: there is no such algorithm, or block size.
        """
        if algorithm not in ALGORITHMS:
            raise BadRequest(f"unsupported algorithm; supported are {', '.join(ALGORITHMS)}")
        self.algorithm = algorithm
        self.is_whole = algorithm in _WHOLE
        if self.is_whole and block_size is not None:
            raise BadRequest('"block_size" is for block hashes; whole checksums have none')
        self.block_size = _PIECE if self.is_whole else _checked(block_size)
        self._new = _WHOLE[algorithm] if self.is_whole else _BLOCK[algorithm]
        self._outer = self._new()

    def splitter(self, start: int) -> Splitter:
        """Return what cuts the extents from ``start`` on into this checksum's blocks."""
        return Splitter(start, self.block_size, _MOST_ZERO_WHOLE if self.is_whole else _MOST_ZERO)

    def begin(self) -> "_Hash":
        """Return what hashes one block that comes in pieces: its digest is the block's part."""
        return self._new()

    def part(self, block: Block, read: Read) -> bytes:
        """Return what a block adds. From any thread; ``read`` is as ``Backend.read``."""
        if self.is_whole:
            return b"".join(bytes(piece) for piece in _content(block, read))
        return self._of(block, read)

    def _of(self, block: Block, read: Read) -> bytes:
        digest = self._new()
        for piece in _content(block, read):
            digest.update(piece)
        return digest.digest()

    def add(self, part: bytes) -> None:
        """Add what ``part`` returned."""
        self._outer.update(part)

    def add_zeros(self, length: int) -> None:
        """Add so many bytes of zeros: whole blocks, or the last one."""
        if self.is_whole:
            for piece in _zeros(length):
                self._outer.update(piece)
            return
        count, rest = divmod(length, self.block_size)
        if count:
            self._outer.update(_zero_part(self.algorithm, self.block_size) * count)
        if rest:
            self._outer.update(_zero_part(self.algorithm, rest))

    def answer(self) -> dict[str, object]:
        """Return the checksum as docs/api.md has it."""
        size = {} if self.is_whole else {"block_size": self.block_size}
        return {"algorithm": self.algorithm, **size, "checksum": self._outer.hexdigest()}


def _checked(block_size: int | None) -> int:
    size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
    if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE or size % BLOCK_ALIGN:
        raise BadRequest(
            f'invalid "block_size": it must be a multiple of {BLOCK_ALIGN} '
            f"from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
        )
    return size


def _content(block: Block, read: Read) -> Iterator[memoryview]:
    """Yield a block's bytes; of its holes nothing is read."""
    at = block.start
    for start, stop in block.data:
        yield from _zeros(start - at)
        with closing(read(start, stop - start)) as pieces:
            yield from pieces
        at = stop
    yield from _zeros(block.start + block.length - at)


def _zeros(length: int) -> Iterator[memoryview]:
    while length > 0:
        step = min(length, len(_ZEROS))
        yield _ZEROS[:step]
        length -= step


@lru_cache(maxsize=64)
def _zero_part(algorithm: str, length: int) -> bytes:
    """Return what a block of zeros adds: it takes longer than all else of a small span."""
    digest = _BLOCK[algorithm]()
    for piece in _zeros(length):
        digest.update(piece)
    return digest.digest()
