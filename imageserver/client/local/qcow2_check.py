# SPDX-License-Identifier: Apache-2.0
"""Whether a qcow2 image is complete and consistent: checked before a byte of it is used.

QEMU reads zeros behind the end of a file, so a truncated image is read without an error. Each
image of a chain must have

    header      marked neither corrupt nor dirty
    metadata    that ``qemu-img check`` finds consistent; leaked clusters (a crash leaves some)
                do no harm
    length      a file, or data file, that reaches to the end of every cluster in use;
                ``qemu-img check`` accepts any part of the last cluster
    raw         the length of the image above it: nothing else tells that its end is missing

The last cluster may lack what lies behind the end of the disk. A compressed cluster may end
anywhere: QEMU fails to unpack one that is truncated.
"""

import json
import re
import sys
from array import array
from collections.abc import Iterator

from imageserver.client.failures import Damaged, LocalFailure
from imageserver.client.local.qcow2_chain import Chain, Member
from imageserver.client.local.qcow2_header import SECTOR, Header
from imageserver.client.local.qemu_programs import as_filename, reason, run

#: Bits of an L2 table's entry.
_OFFSET, _COMPRESSED, _ZERO = 0x00FFFFFFFFFFFE00, 1 << 62, 1 << 0
#: Subclusters with extended entries: lower bits for allocated ones, upper bits for zeros.
_SUBCLUSTERS = 32
#: Statuses of ``qemu-img check``: nothing or leaked clusters found; corruption found.
_SOUND, _DAMAGED = {0, 3}, 2
#: QEMU's message about an image that another of its programs has open for writing.
_LOCKED = re.compile("Failed to get .* lock")


def require_sound(chain: Chain) -> None:
    """Check all images of a chain.

    Raises:
        Damaged: one is incomplete or inconsistent, or cannot be checked.
        LocalFailure: one is in use.
    """
    above: Header | None = None
    for member in chain.members:
        if member.header is not None:
            _require_marks(member, member.header)
            _require_consistent(member)
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


def _require_consistent(member: Member) -> None:
    names = {file.fd: file.path for file in member.files()}
    arguments = ["check", "--output=json", as_filename(member.node())]
    status, output, said = run("qemu-img", arguments, names)
    path = member.file.path
    if status == _DAMAGED:
        first = said.partition("\n")[0].removeprefix("ERROR").strip()
        raise Damaged(f"{path} is damaged: {_corruptions(output)}{first and f' ({first})'}")
    if _LOCKED.search(said):
        raise LocalFailure(f"{path} is being written by another program, as its lock tells")
    if status not in _SOUND:
        raise Damaged(f"{path} cannot be checked: {reason(said, names) or 'qemu-img failed'}")


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
        for number, entry in _late(table, header, length):
            end = _end(entry, first + number * header.cluster_bytes, header, table, number)
            if end > length:
                raise _cut(content.path, length, f"a cluster of it ends at {end}")


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
