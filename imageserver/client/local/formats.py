# SPDX-License-Identifier: Apache-2.0
"""An image on this side: its interface, and raw or qcow2 behind it.

    open_image, create_image --"raw"----> raw.RawFile
                             --"qcow2"--> qcow2_chain, qcow2_check, qcow2.Qcow2

The qcow2 modules are imported when they are needed: starting is a good part of a short transfer,
and raw images, the common case, need neither libnbd nor programs.
"""

import math
import os
from typing import TYPE_CHECKING, Protocol

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import Buffer
from imageserver.client.local.qcow2_header import QCOW2_MAGIC, SECTOR
from imageserver.client.local.raw import RawFile
from imageserver.client.plan import Spans

if TYPE_CHECKING:
    from imageserver.client.local.qcow2_chain import Chain


class LocalImage(Protocol):
    """One image on this side; every method may be called by several threads.

    Where the system allows, Ctrl-C interrupts each method in the main thread.
    """

    size: int

    def spans(self) -> Spans:
        """Return where data may be; everything else reads as zeros."""

    def read(self, start: int, length: int) -> bytes:
        """Return exactly these bytes."""

    def write(self, start: int, data: Buffer) -> None:
        """Write all of ``data``."""

    def zero(self, start: int, stop: int) -> None:
        """Zero a span; make a hole where the format and the file system have holes."""

    def sync(self, within: float = math.inf) -> None:
        """Return when all written data is on stable storage; qcow2: fail after so many seconds."""

    def forget_cached(self) -> None:
        """Drop cached data, so that it is read from the disk next; qcow2: do nothing."""

    def require_unchanged(self) -> None:
        """Require what is only read to be as it was opened: raw as long, qcow2 unwritten.

        Raises:
            LocalFailure: it is not.
        """

    def close(self) -> None:
        """Close it; may be called twice."""

    def abandon(self) -> None:
        """Close it without a sync: what was not synced may be lost."""


def open_image(  # noqa: PLR0913 - options of one image
    path: str,
    kind: str,
    connections: int,
    *,
    writable: bool,
    backing: bool = True,
    damaged: bool = False,
    ours: os.stat_result | None = None,
) -> LocalImage:
    """Open an existing image, which at most ``connections`` threads will use at once.

    ``backing``: accept a qcow2 image that names other files for its content. ``damaged``: accept
    one that is incomplete or inconsistent. ``ours``: the file that ``path`` must lead to.
    """
    if kind == "raw":
        return RawFile.open(path, writable=writable, ours=ours)
    from imageserver.client.local.qcow2 import Qcow2  # noqa: PLC0415 - for qcow2 alone
    from imageserver.client.local.qcow2_chain import Chain  # noqa: PLC0415
    from imageserver.client.local.qcow2_check import require_sound  # noqa: PLC0415

    chain = Chain.open(path, writable=writable, backing=backing, ours=ours)
    try:
        if not damaged:
            require_sound(chain, int(writable))
    except BaseException:
        chain.close()
        raise
    return Qcow2(chain, connections, writable=writable)


def create_image(  # noqa: PLR0913, PLR0917 - options of one image
    path: str,
    kind: str,
    size: int,
    connections: int,
    base: tuple[str, str | None] | None = None,
    ours: os.stat_result | None = None,
) -> LocalImage:
    """Make an empty image, or an overlay of ``base``, a path and its format (None: raw).

    ``ours``: the file that ``path`` must lead to.
    """
    if kind == "raw":
        return RawFile.create(path, size, ours)
    from imageserver.client.local.qcow2 import Qcow2  # noqa: PLC0415 - for qcow2 alone
    from imageserver.client.local.qcow2_chain import Chain  # noqa: PLC0415
    from imageserver.client.local.qcow2_check import require_sound  # noqa: PLC0415

    if base is None:
        return Qcow2.create(path, size, connections, None, ours)
    chain = Chain.open(base[0], base[1] or "raw")
    try:
        _require_base(chain, base[1], size)
        require_sound(chain, 0)
    except BaseException:
        chain.close()
        raise
    return Qcow2.create(path, size, connections, chain, ours)


def _require_base(chain: "Chain", said: str | None, size: int) -> None:
    """Refuse a base whose format is not given and looks like qcow2, or of another size."""
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
    """Refuse a qcow2 base whose chain contains the file to be written."""
    from imageserver.client.local.qcow2_chain import Chain  # noqa: PLC0415 - for qcow2 alone

    chain = Chain.open(base)
    try:
        written = os.stat(file)
        for each in chain.files():
            if each.is_same_as(written):
                raise LocalFailure(f"{base} is based on {file}: it can be no base of that")
    finally:
        chain.close()
