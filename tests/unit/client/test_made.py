# SPDX-License-Identifier: Apache-2.0
"""What imagectl takes for a qcow2 file that a server has made."""

import struct
from pathlib import Path

import pytest

from imageserver.client.failures import Different
from imageserver.client.local.raw import RawFile
from imageserver.client.moving.made import Made
from imageserver.core.extents import Extent
from tests.unit.qcow2_disks import Disk, bytes_of, layout_of

EXTENTS: list[Extent] = [(0, 1000, False, True)]
NO_FILE = "is no qcow2 file of this image"
OTHERS = "names other files"


def _without_change(head: bytearray) -> None:
    pass


def _no_magic(head: bytearray) -> None:
    head[0] = 0


def _larger(head: bytearray) -> None:
    head[24:32] = struct.pack(">Q", 1536)


def _backing(head: bytearray) -> None:
    head[8:20] = struct.pack(">QI", 200, 11)
    head[200:211] = b"/etc/shadow"


def _data_file(head: bytearray) -> None:
    head[79] = 4


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_without_change, ""),
        *((_no_magic, NO_FILE), (_larger, NO_FILE)),
        *((_backing, OTHERS), (_data_file, OTHERS)),
    ],
)
def test_a_file_stands_alone_and_is_of_the_disk(tmp_path: Path, spoil, why: str):
    disk = Disk(EXTENTS)
    made = bytearray(bytes_of(disk, layout_of(disk)))
    spoil(made)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(made)
    local = RawFile.open(str(path), writable=False)
    try:
        if not why:
            Made("etag", 1000).require(local)
            return
        with pytest.raises(Different, match=why):
            Made("etag", 1000).require(local)
    finally:
        local.close()
