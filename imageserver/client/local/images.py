# SPDX-License-Identifier: Apache-2.0
"""FILE as one end of a transfer, by its format; qcow2's means are imported for it alone.

Starting is a good part of a short transfer's time: raw images, the common case, need neither
libnbd nor programs.
"""

import os
from typing import TYPE_CHECKING

from imageserver.client.failures import LocalFailure
from imageserver.client.local.qcow2header import QCOW2_MAGIC
from imageserver.client.local.rawfile import Local, RawFile

if TYPE_CHECKING:
    from imageserver.client.local.chain import Chain

#: What qcow2 images are whole multiples of, in bytes.
SECTOR = 512


def open_image(  # noqa: PLR0913 - what may be said of an image
    path: str,
    kind: str,
    connections: int,
    *,
    writable: bool,
    backing: bool = True,
    damaged: bool = False,
    ours: os.stat_result | None = None,
) -> Local:
    """Open an image that exists; at most ``connections`` threads use it at once.

    ``backing``: also one whose content lies in other files, which it names, with their formats.
    ``damaged``: also a qcow2 image that is not whole. ``ours``: it must be this file.
    """
    if kind == "raw":
        return RawFile.open(path, writable=writable, ours=ours)
    from imageserver.client.local.chain import Chain  # noqa: PLC0415 - for qcow2 alone
    from imageserver.client.local.qcow2 import Qcow2  # noqa: PLC0415
    from imageserver.client.local.soundness import require_sound  # noqa: PLC0415

    chain = Chain.open(path, writable=writable, backing=backing, ours=ours)
    try:
        if not damaged:
            require_sound(chain)
    except BaseException:
        chain.close()
        raise
    return Qcow2(chain, connections, writable=writable)


def create_image(  # noqa: PLR0913, PLR0917 - what may be said of an image
    path: str,
    kind: str,
    size: int,
    connections: int,
    base: tuple[str, str | None] | None = None,
    ours: os.stat_result | None = None,
) -> Local:
    """Make an image of one hole, or an overlay of ``base``: its path, and its format if said.

    It is made in the file that is ``ours``, if that is said.
    """
    if kind == "raw":
        return RawFile.create(path, size, ours)
    from imageserver.client.local.chain import Chain  # noqa: PLC0415 - for qcow2 alone
    from imageserver.client.local.qcow2 import Qcow2  # noqa: PLC0415
    from imageserver.client.local.soundness import require_sound  # noqa: PLC0415

    if base is None:
        return Qcow2.create(path, size, connections, None, ours)
    chain = Chain.open(base[0], base[1] or "raw")
    try:
        _require_base(chain, base[1], size)
        require_sound(chain)
    except BaseException:
        chain.close()
        raise
    return Qcow2.create(path, size, connections, chain, ours)


def _require_base(chain: "Chain", said: str | None, size: int) -> None:
    """Refuse a base of an overlay whose format must be said, or that has another size."""
    file, header = chain.members[0].file, chain.members[0].header
    if said is None and file.read(0, len(QCOW2_MAGIC)) == QCOW2_MAGIC:
        raise LocalFailure(
            f"{file.path} looks like qcow2: say --base-format qcow2 if the disk in it is "
            "the base, --base-format raw if the file is"
        )
    has, wanted = file.length(), size
    if header:
        has, wanted = header.size, -(-size // SECTOR) * SECTOR
    if has != wanted:
        raise LocalFailure(
            f"{file.path} has {has} bytes, the image {size}: it is no earlier state of it"
        )


def refuse_below(base: str, file: str) -> None:
    """Refuse a qcow2 base that is itself based on the file to be written."""
    from imageserver.client.local.chain import Chain  # noqa: PLC0415 - for qcow2 alone

    chain = Chain.open(base)
    try:
        written = os.stat(file)
        for each in chain.files():
            if each.is_same_as(written):
                raise LocalFailure(f"{base} is based on {file}: it can be no base of that")
    finally:
        chain.close()
