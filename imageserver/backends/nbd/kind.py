# SPDX-License-Identifier: Apache-2.0
"""Exports of NBD servers as a kind of image: what a transfer says of one, what can be done with it.

Read by imagectl too: libnbd is imported only when the server opens exports.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imageserver.backends.paths import resolved
from imageserver.core.extents import dirty_context
from imageserver.core.kinds import ImageInfo, ImageKind
from imageserver.core.transfer import (
    InvalidTransfer,
    parse_flag,
    parse_path,
    parse_text,
    path_bytes,
)

if TYPE_CHECKING:
    from imageserver.backends.nbd.exports import NbdExports
    from imageserver.core.holds import Holds
    from imageserver.settings import Settings

#: Longest path of a Unix socket: sizeof(sun_path) less its NUL (unix(7)), in bytes.
MAX_SOCKET_PATH = 107
#: NBD protocol, "String values": names are at most 4096 bytes.
MAX_NAME = 4096


@dataclass(frozen=True, slots=True)
class NbdImage:
    """An export of an NBD server behind a Unix socket."""

    socket: str
    export: str = ""
    bitmap: str | None = None
    flushes_image: bool = False
    """A flush covers what other connections have written, though the server does not say so."""
    sparse: bool = True
    """Zeroing may punch holes; False: what is zeroed stays allocated."""
    at: bytes | None = field(default=None, compare=False)
    """The socket's path without links, of an image that is pinned."""

    @property
    def kind(self) -> ImageKind:
        """What can be done with it."""
        return NBD

    def fields(self) -> dict[str, object]:
        """Return its fields in a transfer's object."""
        return {
            "socket": self.socket,
            "export": self.export,
            "export_bitmap": self.bitmap,
            "flush": "image" if self.flushes_image else "connection",
            "sparse": self.sparse,
        }

    def identity(self) -> Sequence[bytes]:
        """Return the socket without links, and the export."""
        return self.at or resolved(self.socket), self.export.encode()

    def pinned(self) -> "NbdImage":
        """Return the image at the socket to which links lead now."""
        at = resolved(self.socket)
        flushes, sparse = self.flushes_image, self.sparse
        return NbdImage(self.socket, self.export, self.bitmap, flushes, sparse, at)

    @property
    def path(self) -> bytes:
        """Where the socket is looked for."""
        return self.at or path_bytes(self.socket)

    def stamp(self) -> tuple[int, int, int] | None:
        """Return which socket it is now; another server at the same path has another one."""
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return stamp_of(found)

    def __str__(self) -> str:
        return f"nbd:{self.socket}" + (f" {self.export}" if self.export else "")


def stamp_of(found: os.stat_result) -> tuple[int, int, int]:
    """Return which socket one is, as ``NbdImage.stamp``."""
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _parse(fields: Mapping[str, object]) -> NbdImage:
    socket = parse_path(fields, "socket")
    if len(socket.encode()) > MAX_SOCKET_PATH:
        raise InvalidTransfer(f'"socket" must be at most {MAX_SOCKET_PATH} bytes long')
    export = parse_text(fields, "export", default="")
    bitmap = parse_text(fields, "export_bitmap", default="")
    for name, value in (("export", export), ("export_bitmap", dirty_context(bitmap))):
        if len(value.encode()) > MAX_NAME:
            raise InvalidTransfer(f'"{name}" makes a name of over {MAX_NAME} bytes')
    flush = parse_text(fields, "flush", default="connection")
    if flush not in {"connection", "image"}:
        raise InvalidTransfer('"flush" must be "connection" or "image"')
    sparse = parse_flag(fields, "sparse", default=True)
    return NbdImage(socket, export, bitmap or None, flush == "image", sparse)


NBD = ImageKind(
    name="nbd",
    own_fields=("socket", "export", "export_bitmap", "flush", "sparse"),
    parse=_parse,
    methods=("GET", "PUT", "PATCH", "OPTIONS"),
    read_only_methods=("GET", "OPTIONS"),
    features=("extents", "zero", "flush", "digest", "checksum", "qcow2"),
    read_only_features=("extents", "checksum", "qcow2"),
    has_fixed_size=True,
    shares_writers=True,
    asks_server=True,
    assumed=ImageInfo(size=0, read_only=False, can_zero=True, can_flush=True),
)


def opener(settings: "Settings", holds: "Holds") -> "NbdExports":
    """Return what opens exports, once per process."""
    from imageserver.backends.nbd.connection import Tuning  # noqa: PLC0415
    from imageserver.backends.nbd.exports import NbdExports  # noqa: PLC0415
    from imageserver.backends.nbd.pool import Pool  # noqa: PLC0415

    tuning = Tuning(settings.chunk_size, settings.queue_depth, settings.backend_timeout)
    return NbdExports(tuning, Pool(settings.nbd_idle_seconds, holds))
