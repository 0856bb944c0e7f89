# SPDX-License-Identifier: Apache-2.0
"""What a qcow2 image says lies outside of it, read from headers alone, before a program opens it.

    image.qcow2 --"middle", qcow2--> middle --"/base", raw--> /base    followed to its end
                --"base"-----------> ?                                 refused: QEMU would guess

A raw image holds whatever its guest wrote, a qcow2 header too, and that may name any file. So
each link must record the format of what it names: with one that does not, QEMU looks into the
file and believes it. Some versions of qemu-img do so only to describe an image.

What a link names through a protocol (``nbd:``, ``json:``) is not looked at, nor is a file for
an image's data: QEMU takes that for raw.
"""

import os
from dataclasses import dataclass

from imageserver.client.errors import LocalFailure
from imageserver.client.localfile import QCOW2_MAGIC, local_errors

#: More images than any chain has: this one leads in a circle, which QEMU follows for ever.
_MAX_DEPTH = 200
#: The header's fixed part, in bytes, of version 2; all of it lies in the first cluster.
_HEADER_BYTES, _LARGEST_CLUSTER = 72, 2 << 20
_EXTERNAL_DATA = 1 << 2  # in version 3's incompatible features
_BACKING_FORMAT = 0xE2792ACA
#: Longest name of a backing file that QEMU takes, and of a format, in bytes.
_MAX_NAME, _MAX_FORMAT = 1023, 15
#: Formats whose own backing files can be told: raw has none.
_FOLLOWED = {"raw", "qcow2"}


@dataclass(frozen=True, slots=True)
class Header:
    """What an image names: a backing file, its format, a file for its data."""

    backing: str | None
    format: str | None
    has_data_file: bool


def refuse_outside(path: str) -> None:
    """Refuse an image whose content lies elsewhere too."""
    header = read_header(path)
    if header.backing is not None:
        raise LocalFailure(
            f"{path} has the backing file {header.backing!r}: "
            "--backing uploads what that holds as well"
        )
    if header.has_data_file:
        raise LocalFailure(
            f"{path} has its data in another file, which it names: "
            "--backing uploads what that holds"
        )


def require_formats(path: str) -> None:
    """Refuse an image if the format of anything that it is based on would be guessed."""
    image: str | None = path
    for _ in range(_MAX_DEPTH):
        if image is None:
            return
        image = _next(image)
    raise LocalFailure(f"{path} is based on more than {_MAX_DEPTH} images, or on itself")


def _next(image: str) -> str | None:
    """Return the image that this one is based on; None where nothing more can be named."""
    header = read_header(image)
    if not header.backing:
        return None
    shown = image if image.isprintable() else repr(image)
    if not header.format:
        raise LocalFailure(
            f"{shown} has the backing file {header.backing!r}, but does not record its format, "
            "which would be guessed: qemu-img rebase -u -f qcow2 -F FORMAT -b NAME FILE records it"
        )
    if header.format not in _FOLLOWED:
        raise LocalFailure(
            f"{shown} has the backing file {header.backing!r} of format {header.format!r}, "
            "which may name others: imagectl follows raw and qcow2 only"
        )
    return None if header.format == "raw" else _path_of(image, header.backing)


def read_header(path: str) -> Header:
    """Return what the image at ``path`` names."""
    with local_errors(path), open(path, "rb") as file:
        return parse_header(file.read(_LARGEST_CLUSTER))


def parse_header(head: bytes) -> Header:
    """Return what a qcow2 header names; of anything else nothing: QEMU will say what it is not."""
    if head[:4] != QCOW2_MAGIC or len(head) < _HEADER_BYTES:
        return Header(None, None, has_data_file=False)
    version, backing = _number(head, 4), _number(head, 8, 8)
    is_2 = version <= 2  # noqa: PLR2004
    has_data_file = not is_2 and bool(_number(head, 72, 8) & _EXTERNAL_DATA)
    if not backing:
        return Header(None, None, has_data_file)
    name = head[backing : backing + min(_number(head, 16), _MAX_NAME)]
    extensions = head[_HEADER_BYTES if is_2 else _number(head, 100) : backing]
    return Header(os.fsdecode(_text(name)), _backing_format(extensions), has_data_file)


def _backing_format(extensions: bytes) -> str | None:
    """Return the format that header extensions record; None also where they are damaged."""
    found, offset = None, 0
    while offset < len(extensions):
        kind, length = _number(extensions, offset), _number(extensions, offset + 4)
        offset += 8
        if kind == 0:
            break
        content = extensions[offset : offset + length]
        if len(content) < length:
            return None
        if kind == _BACKING_FORMAT:  # the last one counts, as for QEMU
            found = _text(content).decode("ascii", "replace") if length <= _MAX_FORMAT else None
        offset += -(-length // 8) * 8
    return found


def _number(data: bytes, offset: int, length: int = 4) -> int:
    return int.from_bytes(data[offset : offset + length], "big")


def _text(data: bytes) -> bytes:
    """Return what C takes for the string."""
    return data.partition(b"\0")[0]


def _path_of(image: str, name: str) -> str | None:
    """Return the path that ``name`` in an image stands for; None where QEMU sees no path in it."""
    protocol, colon, rest = name.partition(":")
    if colon and "/" not in protocol:
        return rest if protocol == "file" else None
    return os.path.join(os.path.dirname(image), name)
