# SPDX-License-Identifier: Apache-2.0
"""What operators are told of operations that have ended, and of what was touched of an image.

Like operations are one row: of one transfer, by one client, with one outcome. So a backup of
thousands of small ranges does not push everything else out.

What was touched is known in ``CELLS`` equal cells of the image, whatever its size:

    image      |                                                        |
    read       |  0..65535  |        | 1 byte |
    cells      |XXXXXXXXXXXX|........|XX|.................................
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

#: Into how many cells an image is divided.
CELLS = 512
#: How many rows a process keeps, and how many are told of all, of those that finished or failed.
MOST_ROWS = 32


@dataclass(frozen=True, slots=True)
class Ended:
    """Operations that have ended alike. Text is empty, and a status 0, as in ``Entry``."""

    transfer: str
    operation: str
    client: str
    status: int
    error: str
    """The class of what went wrong, empty where nothing did."""
    worker: int
    """The process that the last one ran in."""
    count: int
    done: int
    """Bytes of all."""
    seconds: float
    """... and how long they took in sum."""
    at_ns: int
    """When the last one ended, by the monotonic clock."""


@dataclass(frozen=True, slots=True)
class Touched:
    """Which cells of an image of ``size`` bytes were read and written: bits, the first lowest."""

    transfer: str
    size: int
    read: int
    written: int


@dataclass(frozen=True, slots=True)
class Recently:
    """What ended lately in all processes, the latest first."""

    finished: tuple[Ended, ...]
    failed: tuple[Ended, ...]


def recently(rows: Iterable[Ended]) -> Recently:
    """Add up the rows of several processes."""
    summed: dict[tuple[object, ...], Ended] = {}
    for row in rows:
        key = row.transfer, row.operation, row.client, row.status, row.error
        summed[key] = _sum(summed[key], row) if key in summed else row
    # Of those that ended in one moment, a process has the latest last.
    ordered = [*summed.values()][::-1]
    ordered.sort(key=lambda row: -row.at_ns)
    failed = [row for row in ordered if row.error]
    finished = [row for row in ordered if not row.error]
    return Recently(tuple(finished), tuple(failed))


def _sum(one: Ended, other: Ended) -> Ended:
    latest = max(one, other, key=lambda row: row.at_ns)
    return replace(
        latest,
        count=one.count + other.count,
        done=one.done + other.done,
        seconds=one.seconds + other.seconds,
    )


def all_touched(found: Iterable[Touched]) -> dict[str, Touched]:
    """Return what all processes have touched, by the transfer's id.

    Where processes know images of several sizes, the largest counts: images grow.
    """
    summed: dict[str, Touched] = {}
    for each in found:
        known = summed.get(each.transfer)
        if known is None or each.size > known.size:
            summed[each.transfer] = each
        elif each.size == known.size:
            read, written = known.read | each.read, known.written | each.written
            summed[each.transfer] = Touched(each.transfer, each.size, read, written)
    return summed


def runs(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the first cell of each run of touched cells, and how many they are."""
    cell = 0
    while bits:
        gap = (bits & -bits).bit_length() - 1
        bits >>= gap
        length = (~bits & (bits + 1)).bit_length() - 1
        yield cell + gap, length
        bits >>= length
        cell += gap + length
