# SPDX-License-Identifier: Apache-2.0
"""A qcow2 file that the server makes of an image (``format=qcow2``, docs/api.md).

It is downloaded as it is, byte by byte, like a raw image without extents. A header can name any
file or address that whoever opens the image may read, so what came must be a qcow2 file that
stands alone, and is of the disk that was asked for.
"""

from dataclasses import dataclass

from imageserver.client.failures import Different
from imageserver.client.local.formats import LocalImage
from imageserver.client.local.qcow2_header import (
    LARGEST_CLUSTER,
    QCOW2_MAGIC,
    SECTOR,
    parse_header,
)


@dataclass(frozen=True, slots=True)
class Made:
    """The file: its ETag, and how many bytes the disk in it has."""

    etag: str
    disk_size: int

    def require(self, local: LocalImage) -> None:
        """Require what came to be such a file.

        Raises:
            Different: it is not.
        """
        head = local.read(0, min(local.size, LARGEST_CLUSTER))
        header = parse_header(head)
        wanted = -(-self.disk_size // SECTOR) * SECTOR
        if not head.startswith(QCOW2_MAGIC) or header.size != wanted:
            raise Different("what the server made is no qcow2 file of this image")
        if header.backing or header.data_file or header.has_data_file:
            raise Different("what the server made names other files")
