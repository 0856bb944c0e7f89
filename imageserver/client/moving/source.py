# SPDX-License-Identifier: Apache-2.0
"""The local image that is uploaded, or of which a checksum is computed; what is refused as one."""

import os

from imageserver.client.failures import Damaged, LocalFailure
from imageserver.client.local.formats import LocalImage, open_image
from imageserver.client.local.qcow2_header import QCOW2_MAGIC, SECTOR


def open_source(
    path: str, kind: str | None, connections: int, *, backing: bool, force: bool
) -> LocalImage:
    """Open an image to read it; ``kind``: its format, None where the user names none.

    ``backing``: with what a qcow2 image is based on. ``force``: though it is damaged.

    Raises:
        LocalFailure: it is damaged, incomplete, or may be meant in two ways.
    """
    _refuse_unfinished(path)
    try:
        local = open_image(
            path, kind or "raw", connections, writable=False, backing=backing, damaged=force
        )
    except Damaged as exc:
        raise LocalFailure(f"{exc}; --force takes what QEMU reads of it") from exc
    if kind is None and local.size >= SECTOR:
        _refuse_qcow2(local, path)
    return local


def _refuse_unfinished(path: str) -> None:
    """Refuse a file that a download has not finished: its state lies beside it."""
    for name in (path, os.path.realpath(path)):
        states = [f"{name}.incremental.state"]
        if name.endswith(".part"):
            states.append(f"{name}.state")
        for state in states:
            if os.path.lexists(state):
                raise LocalFailure(
                    f"{path} is the rest of an interrupted download, as {state} tells: "
                    "download it to its end first"
                )


def _refuse_qcow2(local: LocalImage, path: str) -> None:
    """Refuse a file that looks like qcow2: it or its disk could be meant."""
    if local.read(0, len(QCOW2_MAGIC)) == QCOW2_MAGIC:
        local.close()
        raise LocalFailure(
            f"{path} looks like qcow2: say --format qcow2 for the disk in it, "
            "--format raw for the file as it is"
        )
