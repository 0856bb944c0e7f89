# SPDX-License-Identifier: Apache-2.0
"""FILE as one end of a transfer, by its format; qcow2's means are imported for it alone.

Starting is a good part of a short transfer's time: raw images, the common case, need neither
libnbd nor programs.
"""

from imageserver.client.localfile import Local, RawFile


def open_image(
    path: str, kind: str, connections: int, *, writable: bool, backing: bool = True
) -> Local:
    """Open an image that exists; at most ``connections`` threads use it at once.

    ``backing``: also one whose content lies in other files, which it names, with their formats.
    """
    if kind == "raw":
        return RawFile.open(path, writable=writable)
    from imageserver.client.chain import refuse_outside, require_formats  # noqa: PLC0415
    from imageserver.client.qcow2 import Qcow2  # noqa: PLC0415 - for qcow2 alone

    if backing:
        require_formats(path)
    else:
        refuse_outside(path)
    return Qcow2(path, connections, writable=writable)


def create_image(
    path: str, kind: str, size: int, connections: int, base: tuple[str, str | None] | None = None
) -> Local:
    """Make an image of one hole, or an overlay of ``base``: its path, and its format if said."""
    if kind == "raw":
        return RawFile.create(path, size)
    from imageserver.client.qcow2 import Qcow2, checked_base  # noqa: PLC0415 - for qcow2 alone

    return Qcow2.create(path, size, connections, checked_base(*base, size) if base else None)
