# SPDX-License-Identifier: Apache-2.0
"""Whether a qcow2 image is complete and consistent: checked before a byte of it is used.

QEMU reads zeros behind the end of a file, so a truncated image is read without an error. Each
image of a chain must have

    header      marked neither corrupt nor dirty
    metadata    that ``qemu-img check`` finds consistent; in an image that is written, a few leaked
                clusters do no harm (a crash leaves some), many are those of a table that is gone;
                a source has none: an entry of a table that is gone is a cluster leaked, too
    size        no clusters behind the end of its disk
    length      a file, or data file, that reaches to the end of every cluster in use;
                ``qemu-img check`` accepts any part of the last cluster
    raw         the length of the image above it: nothing else tells that its end is missing

The last cluster may lack what lies behind the end of the disk. A compressed cluster ends anywhere
in its last sector, so the one in which a file ends is unpacked: QEMU accepts one that is truncated.
"""

import json
import sys
import zlib
from array import array
from collections.abc import Iterator

from imageserver.client.failures import Damaged, InUse
from imageserver.client.local.qcow2_chain import Chain, Member
from imageserver.client.local.qcow2_header import SECTOR, Header
from imageserver.client.local.qemu_programs import LOCKED, as_filename, reason, run

#: Bits of an L2 table's entry.
_OFFSET, _COMPRESSED, _ZERO = 0x00FFFFFFFFFFFE00, 1 << 62, 1 << 0
_COPIED = 1 << 63
#: Subclusters with extended entries: lower bits for allocated ones, upper bits for zeros.
_SUBCLUSTERS = 32
#: Statuses of ``qemu-img check``: nothing found; corruption; leaked clusters only.
_SOUND, _DAMAGED, _LEAKED = 0, 2, 3
#: More leaked clusters than a crash leaves: half of what one table of the default size names.
_MANY_LEAKS = 4096
#: zlib.decompressobj: a raw stream, and the window of QEMU's (docs/interop/qcow2.txt).
_WINDOW_BITS = -12


def require_sound(chain: Chain, first_source: int | None = None) -> None:
    """Check all images of a chain.

    From number ``first_source`` on they are read only for what is in them: there no leaked cluster
    is put down to a crash.

    Raises:
        Damaged: one is incomplete or inconsistent, or cannot be checked.
        LocalFailure: one is in use.
    """
    above: Header | None = None
    for number, member in enumerate(chain.members):
        if member.header is not None:
            is_source = first_source is not None and number >= first_source
            _require_marks(member, member.header)
            _require_consistent(member, chain.objects, is_source=is_source)
            _require_length(member, member.header)
        elif above is not None:
            _require_raw_length(member, above)
        above = member.header


def _require_marks(member: Member, header: Header) -> None:
    path = member.file.path
    if header.is_corrupt:
        raise Damaged(f"{path} is marked as corrupt: qemu-img check -r all may repair it")
    if header.is_dirty:
        raise Damaged(
            f"{path} is marked as dirty: it is in use, or was not closed as it should be; "
            "qemu-img check -r all repairs that"
        )


def _require_consistent(member: Member, objects: list[str], *, is_source: bool) -> None:
    names = {file.fd: file.path for file in member.files()}
    arguments = ["check", *objects, "--output=json", as_filename(member.node())]
    status, output, said = run("qemu-img", arguments, names)
    path = member.file.path
    if status == _DAMAGED:
        first = said.partition("\n")[0].removeprefix("ERROR").lstrip(": ")
        raise Damaged(f"{path} is damaged: {_corruptions(output)}{first and f' ({first})'}")
    if LOCKED.search(said):
        raise InUse(f"{path} is being written by another program, as its lock tells")
    if status == _LEAKED:
        _require_few_leaks(path, output, is_source=is_source)
    elif status != _SOUND:
        raise Damaged(f"{path} cannot be checked: {reason(said, names) or 'qemu-img failed'}")


def _require_few_leaks(path: str, output: str, *, is_source: bool) -> None:
    found = json.loads(output)
    leaks, used = found.get("leaks", 0), found.get("allocated-clusters", 0)
    if is_source:
        raise Damaged(
            f"{path} may be damaged: no table names {leaks} of its clusters; if a crash has left "
            f"them, qemu-img check -r leaks removes them, but what a lost table named is zeros now"
        )
    if leaks > used or leaks >= _MANY_LEAKS:
        raise Damaged(
            f"{path} is damaged: no table names {leaks} of its clusters, more than a crash "
            f"leaves ({used} are named): what was in them would be zeros"
        )


def _corruptions(output: str) -> str:
    try:
        found = json.loads(output)["corruptions"]
    except (ValueError, KeyError, TypeError):
        return "qemu-img check finds errors"
    return f"qemu-img check finds {found} error{'s' * (found != 1)}"


def _require_raw_length(member: Member, above: Header) -> None:
    length = member.file.length()
    if above.size - length >= SECTOR:
        raise Damaged(
            f"{member.file.path} has {length} bytes, what is based on it {above.size}: "
            "its end may be missing, and would be zeros"
        )


def _require_length(member: Member, header: Header) -> None:
    """Require the file to contain all of every cluster that the disk needs."""
    content = member.data_file or member.file
    length = content.length()
    for first, table in _tables(member, header):
        _require_within(member, header, first, table)
        for number, entry in _late(table, header, length):
            end = _end(entry, first + number * header.cluster_bytes, header, table, number)
            if end > length:
                raise _cut(content.path, length, f"a cluster of it ends at {end}")
        for entry in _compressed_late(table, header, length):
            _require_unpacked(member, header, entry, length)


def _require_within(member: Member, header: Header, first: int, table: "array[int]") -> None:
    """Require the table in which a disk ends to name nothing behind the end: its size was lost.

    The state of a machine that a snapshot has kept lies behind, in tables of its own.
    """
    inside = -(-(header.size - first) // header.cluster_bytes) * _words(header)
    if inside > 0 and any(table[inside:]):
        raise Damaged(
            f"{member.file.path} is damaged: its disk has {header.size} bytes, as its header says, "
            "and a table names clusters behind them"
        )


def _compressed_late(table: "array[int]", header: Header, length: int) -> list[int]:
    """Return the entries of compressed clusters in whose last sector the file ends, or before."""
    bound = length - 2 * header.cluster_bytes  # none needs more than that
    mask = _compressed_mask(header)
    return [
        entry
        for entry in (table[::2] if header.has_extended_l2 else table)
        if entry & _COMPRESSED and entry & mask > bound
    ]


def _compressed_mask(header: Header) -> int:
    """Return which bits of a compressed cluster's entry are its offset; the rest counts sectors."""
    return (1 << 62 - (header.cluster_bytes.bit_length() - 1 - 8)) - 1


def _require_unpacked(member: Member, header: Header, entry: int, length: int) -> None:
    mask = _compressed_mask(header)
    start, more = entry & mask, (entry & ~(_COMPRESSED | _COPIED)) // (mask + 1)
    end = (start // SECTOR + 1 + more) * SECTOR
    if end <= length:
        return
    path = member.file.path
    if end - SECTOR >= length:
        raise _cut(path, length, f"a compressed cluster of it ends behind {end - SECTOR}")
    if header.is_zstd:
        return  # QEMU refuses a frame without its end
    unpacker = zlib.decompressobj(_WINDOW_BITS)
    try:
        unpacker.decompress(member.file.read(start, length - start), header.cluster_bytes + 1)
    except zlib.error as exc:
        raise Damaged(f"{path} is damaged: its last compressed cluster: {exc}") from exc
    if not unpacker.eof:
        raise _cut(path, length, "the end of its last compressed cluster is missing")


def _cut(path: str, length: int, what: str) -> Damaged:
    return Damaged(f"{path} is cut: it has {length} bytes, and {what}")


def _tables(member: Member, header: Header) -> Iterator[tuple[int, "array[int]"]]:
    """Yield the L2 tables, each with the offset in the disk of its first cluster."""
    file, cluster = member.file, header.cluster_bytes
    entries = cluster // (8 * _words(header))
    length, end = file.length(), header.l1_offset + 8 * header.l1_entries
    if end > length:
        raise _cut(file.path, length, f"its first table ends at {end}")
    for index, entry in enumerate(_numbers(file.read(header.l1_offset, 8 * header.l1_entries))):
        offset = entry & _OFFSET
        if not offset:
            continue
        if offset + cluster > length:
            raise _cut(file.path, length, f"a table of it ends at {offset + cluster}")
        yield index * entries * cluster, _numbers(file.read(offset, cluster))


def _words(header: Header) -> int:
    """Return how many 64-bit numbers an L2 entry has."""
    return 1 + header.has_extended_l2


def _numbers(data: bytes) -> "array[int]":
    numbers = array("Q", data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def _late(table: "array[int]", header: Header, length: int) -> list[tuple[int, int]]:
    """Return number and entry of clusters that do not end within the file: few, if any.

    This loop runs over each entry of an image: 16 million for a TiB, in about a second.
    """
    bound = length - header.cluster_bytes
    words = table[::2] if header.has_extended_l2 else table
    return [
        (number, entry)
        for number, entry in enumerate(words)
        if entry & _OFFSET > bound and not entry & _COMPRESSED
    ]


def _end(entry: int, at: int, header: Header, table: "array[int]", number: int) -> int:
    """Return the end in the file of what the disk needs of the cluster at its offset ``at``."""
    offset, needed = entry & _OFFSET, min(header.cluster_bytes, header.size - at)
    if header.has_extended_l2:
        allocated = table[2 * number + 1] & (1 << _SUBCLUSTERS) - 1
        part = header.cluster_bytes // _SUBCLUSTERS
        needed = min(needed, allocated.bit_length() * part)
    elif entry & _ZERO:
        needed = 0
    is_allocated = offset or (header.has_data_file and entry)
    return offset + needed if is_allocated and needed > 0 else 0
