# SPDX-License-Identifier: Apache-2.0
"""The layout of a qcow2 file that is written from front to back, known before its first byte.

    | header | refcount table | refcount blocks | L1 table | L2 | data ... | L2 | data ... | ...
                                                           ^ body: a group, the next, ...

Terms are the specification's (QEMU, docs/interop/qcow2.txt). What one L2 table maps, and that
table with its data clusters in the file, is a *group*; groups without an allocated cluster have
no L2 table. Every cluster of the file is used once, so all reference counts are 1, and the file's
length follows from the number of clusters. Of each group 12 bytes are kept: where it begins, and
a checksum of which of its clusters are allocated, by which a later look at the extents is seen to
differ.

Pure: clusters come from ``qcow2_clusters``, bytes of data from elsewhere.
"""

import hashlib
import struct
import sys
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imageserver.core.errors import BadRequest
from imageserver.core.qcow2_clusters import Run

MIN_CLUSTER_SIZE, DEFAULT_CLUSTER_SIZE, MAX_CLUSTER_SIZE = 4 << 10, 64 << 10, 2 << 20
#: What QEMU opens at most: QCOW_MAX_L1_SIZE and QCOW_MAX_REFTABLE_SIZE, in bytes.
_MAX_L1_SIZE, _MAX_REFTABLE_SIZE = 32 << 20, 8 << 20
#: "Offset into the image file": 56 bits of an L2 entry.
_MAX_FILE_SIZE = 1 << 56
#: "Must not be longer than 1023 bytes."
MAX_BACKING_NAME = 1023
#: Sizes count in sectors: QEMU knows no disk of another size.
_SECTOR = 512

_ENTRY = 8
_COPIED = 1 << 63  # QCOW_OFLAG_COPIED: the reference count is exactly one
_ZERO = 1  # QCOW_OFLAG_ZERO
_REFCOUNT_ORDER = 4
_REFCOUNT = b"\0\1"  # 1 << _REFCOUNT_ORDER bits, big-endian
#: Magic, version, backing file (offset, size), cluster_bits, size, crypt_method, L1 (size, offset),
#: refcount table (offset, clusters), snapshots (number, offset); incompatible, compatible and
#: autoclear features, refcount_order, header_length.
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC, _VERSION = b"QFI\xfb", 3
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT = 0xE2792ACA
#: A key is a group's first cluster of the file, counted from the body's, and its number: the second
#: is below 2**22 (_MAX_L1_SIZE), the first below 2**41 (as many clusters as those groups have).
_GROUP_BITS = 22
_GROUP = (1 << _GROUP_BITS) - 1
_PACK = struct.Struct("<QQ?").pack
#: The metadata in front of the body is made in pieces of about so many bytes.
_PIECE = 256 << 10

#: A group, and what is known of it: its number, its first cluster of the file, how many data
#: clusters it has, a checksum of its runs.
Group = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a file before its extents: made by ``shaped``."""

    size: int
    """Of the image, in bytes."""
    cluster_bits: int
    backing: str | None = None
    backing_format: str | None = None

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def group_bits(self) -> int:
        """A group has 1 << so many clusters: cluster size / 8."""
        return self.cluster_bits - 3

    @property
    def group_size(self) -> int:
        """Bytes of the disk in a group."""
        return 1 << (self.cluster_bits + self.group_bits)

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk: whole sectors."""
        return -(-self.size // _SECTOR) * _SECTOR

    @property
    def l1_entries(self) -> int:
        """Entries of the L1 table: one at least."""
        return max(1, -(-self.virtual_size // self.group_size))


def shaped(
    size: int, cluster_size: int | None, backing: str | None, backing_format: str | None
) -> Shape:
    """Return the shape of a file for an image of ``size`` bytes.

    ``cluster_size``: a power of two; None: the default, or the least that is enough.

    Raises:
        BadRequest: QEMU would not open a file of this size with such clusters.
    """
    least = MIN_CLUSTER_SIZE
    while _l1_size(size, least) > _MAX_L1_SIZE:
        least *= 2
    if least > MAX_CLUSTER_SIZE:
        raise BadRequest("the image is too large for qcow2")
    if cluster_size is not None and cluster_size < least:
        raise BadRequest(f'"cluster_size" must be at least {least} for an image of {size} bytes')
    chosen = cluster_size or max(least, DEFAULT_CLUSTER_SIZE)
    return Shape(size, chosen.bit_length() - 1, backing, backing_format)


def _l1_size(size: int, cluster_size: int) -> int:
    return Shape(size, cluster_size.bit_length() - 1).l1_entries * _ENTRY


class Survey:
    """Counts the clusters of a file: fed with runs, in order, cut at groups."""

    def __init__(self, group_bits: int) -> None:
        self._bits = group_bits
        self._group = -1
        #: L2 tables and data clusters so far.
        self.clusters = 0
        self.keys, self.checks = array("Q"), array("I")
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, runs: Iterable[Run]) -> None:
        """Count runs: see ``qcow2_clusters.split``."""
        update, check = self._digest.update, self.checks[-1] if self.checks else 0
        for run in runs:
            first, stop, has_data = run
            group = first >> self._bits
            if group != self._group:
                if self.checks:
                    self.checks[-1] = check
                self.keys.append(self.clusters << _GROUP_BITS | group)
                self.checks.append(0)
                self._group, check = group, 0
                self.clusters += 1
            if has_data:
                self.clusters += stop - first
            packed = _PACK(*run)
            check = zlib.crc32(packed, check)
            update(packed)
        if self.checks:
            self.checks[-1] = check

    def digest(self) -> bytes:
        """Return what all runs hash to."""
        return self._digest.digest()

    def groups(self) -> list[Group]:
        """Return all groups; their first clusters are counted from the first of them."""
        return list(_groups(self, 0, len(self.keys)))


def _groups(survey: Survey, first: int, stop: int) -> Iterator[Group]:
    keys = survey.keys
    for index in range(first, stop):
        begin = keys[index] >> _GROUP_BITS
        end = keys[index + 1] >> _GROUP_BITS if index + 1 < len(keys) else survey.clusters
        yield keys[index] & _GROUP, begin, end - begin - 1, survey.checks[index]


class Layout:
    """Where everything of one file lies."""

    def __init__(self, shape: Shape, survey: Survey) -> None:
        """``survey``: of the whole image.

        Raises:
            BadRequest: QEMU would not open a file with so many clusters.
        """
        self.shape, self._survey = shape, survey
        size = shape.cluster_size
        self._per_block = size // len(_REFCOUNT)
        self._per_table = size // _ENTRY
        l1_clusters = -(-shape.l1_entries // self._per_table)
        self._blocks = self._table_clusters = 0
        while True:
            before = 1 + self._table_clusters + self._blocks
            clusters = before + l1_clusters + survey.clusters
            blocks = -(-clusters // self._per_block)
            if blocks == self._blocks:
                break
            self._blocks, self._table_clusters = blocks, -(-blocks // self._per_table)
        self._l1_at, self._body, self._clusters = before, before + l1_clusters, clusters
        if self._table_clusters * size > _MAX_REFTABLE_SIZE or self.length > _MAX_FILE_SIZE:
            raise BadRequest(f'"cluster_size" must be more than {size} for so much data')

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self._clusters << self.shape.cluster_bits

    @property
    def body(self) -> int:
        """Where the first group begins, in bytes."""
        return self._body << self.shape.cluster_bits

    @property
    def count(self) -> int:
        """How many groups have an L2 table."""
        return len(self._survey.keys)

    def digest(self) -> bytes:
        """Return a digest of the layout, but for the backing file's name."""
        shape = self.shape
        told = struct.pack("<QQ", shape.size, shape.cluster_size) + self._survey.digest()
        return hashlib.blake2b(told, digest_size=16).digest()

    def index_at(self, offset: int) -> int:
        """Return which of the groups has the byte at ``offset`` of the file, in the body."""
        cluster = (offset >> self.shape.cluster_bits) - self._body
        return bisect_right(self._survey.keys, cluster << _GROUP_BITS | _GROUP) - 1

    def number(self, index: int) -> int:
        """Return a group's number."""
        return self._survey.keys[index] & _GROUP

    def offset(self, index: int) -> int:
        """Return where a group begins in the file, in bytes."""
        return ((self._survey.keys[index] >> _GROUP_BITS) + self._body) << self.shape.cluster_bits

    def groups(self, first: int, stop: int) -> list[Group]:
        """Return groups by index; their first clusters are counted from the first of them."""
        base = self._survey.keys[first] >> _GROUP_BITS
        found = _groups(self._survey, first, stop)
        return [(number, begin - base, count, check) for number, begin, count, check in found]

    # Bytes

    def metadata(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the file's bytes [start, stop), all in front of the body."""
        bits = self.shape.cluster_bits
        step = max(1, _PIECE >> bits)
        for first in range(start >> bits, ((stop - 1) >> bits) + 1, step):
            many = range(first, min(first + step, self._body))
            at = first << bits
            piece = b"".join(map(self._cluster, many))
            yield piece[max(0, start - at) : stop - at]

    def _cluster(self, number: int) -> bytes:
        """Return a cluster in front of the body."""
        if number == 0:
            return self._header()
        number -= 1
        if number < self._table_clusters:
            return self._refcount_table(number)
        number -= self._table_clusters
        return self._refcounts(number) if number < self._blocks else self._l1(number - self._blocks)

    def _header(self) -> bytes:
        shape = self.shape
        name, extensions = (shape.backing or "").encode(), b""
        if shape.backing_format:
            text = shape.backing_format.encode()
            extensions += _EXTENSION.pack(_BACKING_FORMAT, len(text)) + _padded(text)
        extensions += _EXTENSION.pack(0, 0)
        name_at = _HEADER.size + len(extensions) if name else 0
        table_at, l1_at = 1 << shape.cluster_bits, self._l1_at << shape.cluster_bits
        header = _HEADER.pack(
            *(_MAGIC, _VERSION, name_at, len(name), shape.cluster_bits, shape.virtual_size, 0),
            *(shape.l1_entries, l1_at, table_at, self._table_clusters, 0, 0),
            *(0, 0, 0, _REFCOUNT_ORDER, _HEADER.size),
        )
        return (header + extensions + name).ljust(shape.cluster_size, b"\0")

    def _refcount_table(self, number: int) -> bytes:
        first = number * self._per_table
        blocks = range(first, min(first + self._per_table, self._blocks))
        at = 1 + self._table_clusters
        return self._table([(at + block) << self.shape.cluster_bits for block in blocks])

    def _refcounts(self, block: int) -> bytes:
        used = min(self._per_block, self._clusters - block * self._per_block)
        return (_REFCOUNT * used).ljust(self.shape.cluster_size, b"\0")

    def _l1(self, number: int) -> bytes:
        keys = self._survey.keys
        first = number * self._per_table
        low = bisect_left(keys, first, key=_number)
        high = bisect_left(keys, first + self._per_table, key=_number)
        entries = [0] * self._per_table
        for index in range(low, high):
            entries[self.number(index) - first] = self.offset(index) | _COPIED
        return self._table(entries)

    def l2_table(self, index: int, runs: Iterable[Run]) -> bytes:
        """Return a group's L2 table; ``runs``: all of the group's."""
        size = self.shape.cluster_size
        entries = array("Q", bytes(size))
        first_cluster = self.number(index) << self.shape.group_bits
        at = self.offset(index) + size
        for first, stop, has_data in runs:
            low, high = first - first_cluster, stop - first_cluster
            if has_data:
                end = at + (high - low) * size
                entries[low:high] = array("Q", range(at | _COPIED, end | _COPIED, size))
                at = end
            else:
                entries[low:high] = array("Q", (_ZERO,)) * (high - low)
        return _big_endian(entries)

    def _table(self, entries: list[int]) -> bytes:
        return _big_endian(array("Q", entries)).ljust(self.shape.cluster_size, b"\0")


def _number(key: int) -> int:
    return key & _GROUP


def _padded(text: bytes) -> bytes:
    return text.ljust(-(-len(text) // 8) * 8, b"\0")


def _big_endian(entries: "array[int]") -> bytes:
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes()
