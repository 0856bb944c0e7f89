# SPDX-License-Identifier: Apache-2.0
"""Disks of chosen extents, as an open back end and as files, for tests of qcow2 streams."""

import json
import subprocess
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imageserver.core.extents import Extent
from imageserver.core.kinds import ImageInfo
from imageserver.core.qcow2_layout import Layout, shaped
from imageserver.core.ranges import Span, whole
from imageserver.images.held import Held
from imageserver.images.qcow2_stream import stream, survey
from imageserver.images.sessions import Session
from tests.unit.fakes import DISK, a_request

#: How many extents the back end tells of at once.
_BATCH = 3
_PIECE = 100_000


@dataclass
class Disk:
    """``ports.Backend``, as far as streams need it, of extents that cover it from 0."""

    extents_: Sequence[Extent]
    seed: int = 1
    reads: list[tuple[int, int]] = field(default_factory=list)
    on_extents: Callable[[int, int], None] = lambda *_: None

    @property
    def size(self) -> int:
        return self.extents_[-1][0] + self.extents_[-1][1] if self.extents_ else 0

    @property
    def info(self) -> ImageInfo:
        return ImageInfo(self.size, read_only=False, can_zero=True, can_flush=True)

    def content(self, start: int, stop: int) -> bytes:
        """Return what lies in a span: of data no byte is zero, and dirty data has the seed."""
        found = bytearray(stop - start)
        for at, length, zero, dirty in self.extents_:
            low, high = max(at, start), min(at + length, stop)
            if low < high and not zero:
                found[low - start : high - start] = _pattern(low, high, self.seed if dirty else 1)
        return bytes(found)

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Generator[memoryview]:
        for start, stop in spans:
            self.reads.append((start, stop))
            for at in range(start, stop, _PIECE):
                yield memoryview(self.content(at, min(at + _PIECE, stop)))

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        self.on_extents(start, stop)
        cut = [
            (max(at, start), min(at + length, stop) - max(at, start), zero, flag and dirty)
            for at, length, zero, flag in self.extents_
            if at < stop and at + length > start
        ]
        for index in range(0, len(cut), _BATCH):
            yield cut[index : index + _BATCH]
        yield []

    def close(self) -> None:
        pass

    def write_raw(self, path: Path) -> None:
        """Write the disk as a raw file, whose holes are what is zero."""
        with path.open("wb") as file:
            for start, length, zero, _ in self.extents_:
                if not zero:
                    file.seek(start)
                    file.write(self.content(start, start + length))
            file.truncate(self.size)


def _pattern(start: int, stop: int, seed: int) -> bytes:
    period = bytes((n * 7 + seed) % 255 + 1 for n in range(251))
    first = start % 251
    return (period * ((stop - start) // 251 + 2))[first : first + stop - start]


def session_of(disk: Any) -> Session:
    """Return a session in which a disk is open."""
    held = Held()
    held.backend = disk
    return Session(DISK, held, a_request(), lambda _: disk)


def layout_of(
    disk: Any,
    cluster_size: int | None = None,
    *,
    overlay: bool = False,
    backing: str | None = None,
    backing_format: str | None = None,
) -> Layout:
    """Return the layout of a disk's file."""
    shape = shaped(disk.size, cluster_size, backing, backing_format)
    return survey(session_of(disk), shape, overlay=overlay)


def bytes_of(
    disk: Any, layout: Layout, start: int = 0, stop: int | None = None, *, overlay: bool = False
) -> bytes:
    """Return bytes of a disk's file."""
    span = whole(layout.length) if stop is None else Span(start, stop, layout.length)
    pieces = stream(session_of(disk), layout, span, overlay=overlay)
    return b"".join(bytes(piece) for piece in pieces)


def qemu_img(*arguments: object) -> str:
    """Run qemu-img, which must succeed; return what it writes."""
    command = ["qemu-img", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def map_of(path: Path) -> list[dict[str, Any]]:
    """Return ``qemu-img map`` of an image."""
    found: list[dict[str, Any]] = json.loads(qemu_img("map", "--output=json", path))
    return found
