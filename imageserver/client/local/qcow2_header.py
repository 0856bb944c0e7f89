# SPDX-License-Identifier: Apache-2.0
"""A qcow2 header, parsed: files that the image names, its size, where its tables are.

The layout is docs/interop/qcow2.txt of QEMU. No I/O; nonsense is not refused here but by QEMU.
"""

import os
from dataclasses import dataclass

#: The first bytes of a qcow2 file.
QCOW2_MAGIC = b"QFI\xfb"
#: QEMU's sector, in bytes: qcow2 images have whole ones only, a raw file may lack part of the last.
SECTOR = 512
#: All of a header, with its extensions and names, lies in the first cluster, of at most 2 MiB.
LARGEST_CLUSTER = 2 << 20
#: The fixed part in bytes, of version 2 and of version 3.
_HEADER_BYTES, _HEADER_3_BYTES = 72, 104
#: Bits of version 3's incompatible features.
_DIRTY, _CORRUPT, _EXTERNAL_DATA = 1 << 0, 1 << 1, 1 << 2
_COMPRESSION_TYPE, _EXTENDED_L2 = 1 << 3, 1 << 4
#: The compression type that is not deflate.
_ZSTD = b"\1"
#: The encryption method.
_LUKS = 2
#: Types of header extensions.
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
#: Longest name of another file that QEMU takes, and of a format, in bytes.
_MAX_NAME, _MAX_FORMAT = 1023, 15


@dataclass(frozen=True, slots=True)
class Header:
    """The header's fields; sizes in bytes, tables by their offset in the file."""

    backing: str | None = None
    format: str | None = None
    """The recorded format of the backing file."""
    has_data_file: bool = False
    data_file: str | None = None
    size: int = 0
    cluster_bytes: int = 0
    l1_offset: int = 0
    l1_entries: int = 0
    is_dirty: bool = False
    is_corrupt: bool = False
    has_extended_l2: bool = False
    is_zstd: bool = False
    """Compressed clusters are zstd frames, not deflate streams."""
    is_luks: bool = False
    """The clusters are encrypted, by a passphrase's key in a LUKS header."""


def parse_header(head: bytes) -> Header:
    """Parse a qcow2 header; of other files return an empty one: QEMU will refuse them."""
    if head[:4] != QCOW2_MAGIC or len(head) < _HEADER_BYTES:
        return Header()
    is_2 = _number(head, 4) <= 2  # noqa: PLR2004 - the version
    features = 0 if is_2 else _number(head, 72, 8)
    backing = _number(head, 8, 8)
    start = _HEADER_BYTES if is_2 else _number(head, 100) or _HEADER_3_BYTES
    # An extension of type 0 is the last; the backing file's name ends them, too.
    found = _extensions(head[start : backing or LARGEST_CLUSTER])
    name = head[backing : backing + min(_number(head, 16), _MAX_NAME)]
    data_file = found.get(_DATA_FILE)
    bits = _number(head, 20)
    return Header(
        backing=os.fsdecode(_text(name)) if backing else None,
        format=_format(found.get(_BACKING_FORMAT)) if backing else None,
        has_data_file=bool(features & _EXTERNAL_DATA),
        data_file=os.fsdecode(_text(data_file)) if data_file else None,
        size=_number(head, 24, 8),
        cluster_bytes=1 << bits if bits < 64 else 0,  # noqa: PLR2004 - QEMU takes 9 to 21
        l1_offset=_number(head, 40, 8),
        l1_entries=_number(head, 36),
        is_dirty=bool(features & _DIRTY),
        is_corrupt=bool(features & _CORRUPT),
        has_extended_l2=bool(features & _EXTENDED_L2),
        is_zstd=bool(features & _COMPRESSION_TYPE) and head[104:105] == _ZSTD,
        is_luks=_number(head, 32) == _LUKS,
    )


def _extensions(text: bytes) -> dict[int, bytes]:
    """Return extensions by type, like QEMU the last of each; none where they are damaged."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset < len(text):
        kind, length = _number(text, offset), _number(text, offset + 4)
        offset += 8
        if kind == 0:
            break
        content = text[offset : offset + length]
        if len(content) < length:
            return {}
        found[kind] = content
        offset += -(-length // 8) * 8
    return found


def _format(content: bytes | None) -> str | None:
    if content is None or len(content) > _MAX_FORMAT:
        return None
    return _text(content).decode("ascii", "replace")


def _number(data: bytes, offset: int, length: int = 4) -> int:
    return int.from_bytes(data[offset : offset + length], "big")


def _text(data: bytes) -> bytes:
    """Return the text up to the first NUL, as C does."""
    return data.partition(b"\0")[0]
