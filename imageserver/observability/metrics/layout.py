# SPDX-License-Identifier: Apache-2.0
"""A file of counts, as bytes: every declared series has its fixed place in it.

    8s magic   8s layout   d d d ...   a number for each of ``SERIES``, in their order

The layout is a hash of all series, so a server that declares others leaves the file out.
"""

import hashlib
import math
import struct
from array import array
from collections.abc import Iterable, Iterator
from itertools import product
from typing import TypeAlias

from imageserver.observability.metrics.declared import BUCKETS, METRICS, STATUSES, Metric, Type

#: A number for each series.
Counts: TypeAlias = "array[float]"

#: Upper ends of the buckets, as Prometheus writes them; each counts what is in no smaller one.
ENDS = (*map(str, BUCKETS), "+Inf")
#: The place, beside a histogram's buckets, of the sum of what was observed.
SUM = "sum"

COUNTED = tuple(metric for metric in METRICS if metric.type is not Type.GAUGE)


def labels_of(metric: Metric) -> Iterator[tuple[str, ...]]:
    """Return every combination of the metric's labels, in their order."""
    return product(*(STATUSES if found is None else found for _, found in metric.labels))


def _series() -> Iterator[tuple[str, ...]]:
    for metric in COUNTED:
        for labels in labels_of(metric):
            for part in (*ENDS, SUM) if metric.type is Type.HISTOGRAM else ("",):
                yield metric.name, *labels, part


#: Where each series' number is among all; the key is name, labels, and a histogram's part or "".
PLACES = {series: place for place, series in enumerate(_series())}

#: Where a metric's series begin; they follow each other.
_FIRST = {name: place for (name, *_), place in reversed(PLACES.items())}
_MAGIC = b"imgcount"
_HEADER = _MAGIC + hashlib.sha256(repr([*PLACES]).encode()).digest()[:8]
_NUMBERS = struct.Struct(f"={len(PLACES)}d")
#: Bytes of a file.
SIZE = len(_HEADER) + _NUMBERS.size


class DamagedFile(Exception):
    """The bytes are no file of counts."""


class OtherLayout(DamagedFile):
    """A server that declares other series has written it."""


def no_counts() -> "Counts":
    """Return a zero for every series."""
    return array("d", bytes(_NUMBERS.size))


def place_of(metric: Metric, *labels: str, part: str = "") -> int:
    """Return a series' place.

    Raises:
        ValueError: it is not declared.
    """
    try:
        return PLACES[metric.name, *labels, part]
    except KeyError as exc:
        raise ValueError(f"{metric.name} of {labels} is not declared") from exc


def counts_of(metric: Metric, counts: "Counts") -> Iterator[tuple[tuple[str, ...], float]]:
    """Return the labels of each series of a metric that is no histogram, and its number."""
    return zip(labels_of(metric), counts[_FIRST[metric.name] :], strict=False)


def pack_counts(counts: "Counts") -> bytes:
    """Return a file's bytes."""
    return _HEADER + counts.tobytes()


def parse_counts(data: bytes) -> "Counts | None":
    """Return what a file has counted; None: its process has not written anything yet.

    Raises:
        OtherLayout: another version has written it.
        DamagedFile: it was cut short, or written over.
    """
    header = data[: len(_HEADER)]
    if header.startswith(_MAGIC) and header != _HEADER[: len(header)]:
        raise OtherLayout("another version has written it")
    if len(data) < SIZE:
        raise DamagedFile("it was cut short")
    if not any(header):
        return None
    counts = array("d", data[len(_HEADER) : SIZE])
    if header != _HEADER or min(counts) < 0 or not math.isfinite(sum(counts)):
        raise DamagedFile("it was written over")
    return counts


def add_up(found: Iterable["Counts"]) -> "Counts":
    """Return the sums over several files, or parts of one."""
    return array("d", map(sum, zip(*found, strict=True)))
