# SPDX-License-Identifier: Apache-2.0
"""What each image may contain: every byte a reader may see, and no other.

An image has one writing client, so its history is a line:

    committed     the bytes after the last write that was answered 200
    under way     the write that has been begun, if any: each of its bytes is old or new
    interrupted   writes that got no 200: each of their bytes is old or new, for good, or until
                  a later write that was answered has gone over it; then it must never show

A read that overlaps writes in time may see, in each byte, what was committed when the read
began, or what any write under way since then has brought. A file image is replaced as a
whole: there a read sees one version, not a mixture.
"""

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

_BLOCK = 4096


def pattern(source: random.Random, size: int) -> bytes:
    """Return ``size`` bytes that tell one write from another."""
    block = source.randbytes(_BLOCK)
    return (block * (size // _BLOCK + 1))[:size]


class WrongBytes(Exception):
    """A reader saw what was never written, or was overwritten; ``str()`` says where."""


@dataclass(eq=False, slots=True)
class Write:
    """Bytes ``data`` for an image from ``start`` on."""

    start: int
    data: bytes
    done: bool | None = False
    """Answered 200; interrupted (False); or refused before a byte (None)."""

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + len(self.data)

    def slice(self, start: int, stop: int) -> bytes:
        """Return its bytes from ``start`` to ``stop`` of the image."""
        return self.data[start - self.start : stop - self.start]


@dataclass(eq=False, slots=True)
class Read:
    """A read of [start, stop) under way, and what it may see."""

    start: int
    stop: int
    base: bytes
    writes: list[Write] = field(default_factory=list)


class Model:
    """One image; ``is_whole``: replaced as a whole or not at all."""

    def __init__(self, size: int, *, is_whole: bool) -> None:
        self.size = size
        self.is_whole = is_whole
        self._lock = threading.Lock()
        self._committed = bytearray(size)
        self._current: Write | None = None
        self._interrupted: list[Write] = []
        self._reads: list[Read] = []

    # The image's only writer

    @contextlib.contextmanager
    def writing(self, start: int, data: bytes) -> Iterator[Write]:
        """Note a write that is sent and answered within the block, which sets its ``done``."""
        write = Write(start, data)
        with self._lock:
            self._current = write
            for read in self._reads:
                if write.start < read.stop and read.start < write.stop:
                    read.writes.append(write)
        try:
            yield write
        finally:
            with self._lock:
                self._current = None
                self._end(write)

    def _end(self, write: Write) -> None:
        if write.done:
            self._committed[write.start : write.stop] = write.data
            self._interrupted = [
                piece
                for other in self._interrupted
                for piece in _outside(other, write.start, write.stop)
            ]
        elif write.done is False:
            self._interrupted.append(write)

    # Its readers

    @contextlib.contextmanager
    def reading(self, start: int, stop: int) -> Iterator[Read]:
        """Note a read whose request is sent and answered within the block."""
        with self._lock:
            read = Read(start, stop, bytes(self._committed[start:stop]))
            candidates = self._interrupted + ([self._current] if self._current else [])
            read.writes += [w for w in candidates if w.start < stop and start < w.stop]
            self._reads.append(read)
        try:
            yield read
        finally:
            with self._lock:
                self._reads.remove(read)

    def check(self, read: Read, data: bytes) -> None:
        """Compare what has come of a read, its beginning at least, with what it may see.

        Raises:
            WrongBytes: it saw something else.
        """
        if data == read.base[: len(data)]:
            return
        with self._lock:
            writes = list(read.writes)
        if self.is_whole:
            versions = [w.slice(read.start, read.stop)[: len(data)] for w in writes]
            if data not in versions:
                raise WrongBytes(f"file: {len(data)} bytes at {read.start} are no version of it")
            return
        stop = read.start + len(data)
        edges = {read.start, stop}
        edges.update(e for w in writes for e in (w.start, w.stop) if read.start < e < stop)
        cuts = sorted(edges)
        for low, high in itertools.pairwise(cuts):
            seen = data[low - read.start : high - read.start]
            allowed = [read.base[low - read.start : high - read.start]]
            allowed += [w.slice(low, high) for w in writes if w.start <= low and high <= w.stop]
            _check_bytes(low, seen, allowed)

    def check_zero(self, read: Read | None, start: int, stop: int) -> None:
        """Check that [start, stop), said to read as zeros, may be zeros.

        Raises:
            WrongBytes: there is data.
        """
        if read:
            base = read.base[start - read.start : stop - read.start]
            self.check(Read(start, stop, base, read.writes), bytes(stop - start))

    def check_clean(self, start: int, stop: int) -> None:
        """Believe that [start, stop) has not changed: only a backup could tell."""


class Extended(Protocol):
    """An image whose extents can be checked."""

    size: int

    def check_zero(self, read: Read | None, start: int, stop: int) -> None:
        """Check that [start, stop), said to read as zeros, may be zeros."""

    def check_clean(self, start: int, stop: int) -> None:
        """Check that [start, stop), said to be clean, is what it was before."""


def check_extents(
    extents: list[dict[str, Any]], image: Extended, read: Read | None, *, dirty: bool
) -> None:
    """Check a list of extents: its form, and that what it lets a backup skip may be skipped.

    Raises:
        WrongBytes: it has gaps, overlaps or neighbours that agree, ends too early or too late,
            calls zero what is not, or clean what has changed.
    """
    fields = {"start", "length", "zero"} | ({"dirty"} if dirty else set())
    at = 0
    for extent in extents:
        if set(extent) != fields or extent["start"] != at or extent["length"] <= 0:
            raise WrongBytes(f"extents: {extent} at {at}")
        at += extent["length"]
    if at != image.size:
        raise WrongBytes(f"extents end at {at} instead of {image.size}")
    for left, right in itertools.pairwise(extents):
        if all(left[flag] == right[flag] for flag in fields - {"start", "length"}):
            raise WrongBytes(f"extents: neighbours agree at {right['start']}")
    for extent in extents:
        start, stop = extent["start"], extent["start"] + extent["length"]
        if extent["zero"]:
            image.check_zero(read, start, stop)
        if not extent.get("dirty", True):
            image.check_clean(start, stop)


def _check_bytes(start: int, seen: bytes, allowed: list[bytes]) -> None:
    if seen in allowed:
        return
    # Where one write ends and another begins is within a block; only there bytes are compared.
    for at in range(0, len(seen), _BLOCK):
        block = seen[at : at + _BLOCK]
        pieces = [other[at : at + _BLOCK] for other in allowed]
        if block in pieces:
            continue
        for place, byte in enumerate(block):
            if all(piece[place] != byte for piece in pieces):
                raise WrongBytes(
                    f"byte {start + at + place} is {byte:#04x}, allowed "
                    f"{[hex(piece[place]) for piece in pieces]}, "
                    f"in [{start}, {start + len(seen)})"
                )


def _outside(write: Write, start: int, stop: int) -> list[Write]:
    """Return what is left of a write outside [start, stop)."""
    pieces = []
    if write.start < start:
        end = min(write.stop, start)
        pieces.append(Write(write.start, write.slice(write.start, end)))
    if write.stop > stop:
        begin = max(write.start, stop)
        pieces.append(Write(begin, write.slice(begin, write.stop)))
    return pieces
