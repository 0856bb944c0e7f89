# SPDX-License-Identifier: Apache-2.0
"""Files as kinds of images: what a transfer says of one, what can be done with it.

The transfer's ``format`` says which kind: bytes that are not interpreted, or a disk.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imageserver.backends.paths import resolved
from imageserver.core.kinds import ImageInfo, ImageKind
from imageserver.core.transfer import InvalidTransfer, parse_flag, parse_path, parse_text

if TYPE_CHECKING:
    from imageserver.backends.file.image import ImageFiles
    from imageserver.backends.file.raw import RawFiles
    from imageserver.core.holds import Holds
    from imageserver.settings import Settings


@dataclass(frozen=True, slots=True)
class FileImage:
    """The bytes of a file or block device."""

    path: str
    raw: bool = False
    """They are a disk: its ranges can be written. Otherwise they are replaced as a whole."""
    sparse: bool = True
    """Zeroing a disk may punch holes; False: what is zeroed stays allocated."""
    at: bytes | None = field(default=None, compare=False)
    """The path without links, of an image that is pinned."""

    @property
    def kind(self) -> ImageKind:
        """What can be done with it."""
        return RAW if self.raw else FILE

    def fields(self) -> dict[str, object]:
        """Return its fields in a transfer's object."""
        if self.raw:
            return {"file": self.path, "format": "raw", "sparse": self.sparse}
        return {"file": self.path, "format": "opaque"}

    def identity(self) -> Sequence[bytes]:
        """Return the path without links."""
        return (self.at or resolved(self.path),)

    def pinned(self) -> "FileImage":
        """Return the image at the file to which links lead now."""
        return FileImage(self.path, self.raw, self.sparse, resolved(self.path))

    def stamp(self) -> None:
        """Return None: no server is between us and the file."""

    def __str__(self) -> str:
        return self.path


def _parse(fields: Mapping[str, object]) -> FileImage:
    path = parse_path(fields, "file")
    file_format = parse_text(fields, "format", default="opaque")
    if file_format not in {"opaque", "raw"}:
        raise InvalidTransfer('"format" must be "raw" or "opaque"')
    if file_format == "opaque":
        return FileImage(path)
    return FileImage(path, raw=True, sparse=parse_flag(fields, "sparse", default=True))


FILE = ImageKind(
    name="file",
    own_fields=("file", "format"),
    parse=_parse,
    methods=("GET", "PUT", "POST", "OPTIONS"),
    read_only_methods=("GET", "POST", "OPTIONS"),
    features=("flush", "digest", "checksum"),
    read_only_features=("flush", "checksum"),
    patch_refusal="range writes and PATCH not supported for file backend; use PUT for full upload",
    extents_refusal="extents not supported for file backend",
    qcow2_refusal="format=qcow2 not supported for file backend; a file is sent as it is",
    has_fixed_size=False,
    shares_writers=False,
    asks_server=False,
    assumed=ImageInfo(size=0, read_only=False, can_zero=False, can_flush=True),
)

#: A file that is a disk: what an NBD server would make of it, without one.
RAW = ImageKind(
    name="raw",
    backend="file",
    own_fields=("file", "format", "sparse"),
    parse=_parse,
    methods=("GET", "PUT", "PATCH", "OPTIONS"),
    read_only_methods=("GET", "OPTIONS"),
    features=("extents", "zero", "flush", "digest", "checksum", "qcow2"),
    read_only_features=("extents", "checksum", "qcow2"),
    has_fixed_size=True,
    shares_writers=True,
    asks_server=False,
    looks=True,
    assumed=ImageInfo(
        size=0,
        read_only=False,
        can_zero=True,
        can_flush=True,
        multi_conn=True,
        flushes_image=True,
    ),
)


def opener(settings: "Settings", _holds: "Holds") -> "ImageFiles":
    """Return what opens image files, once per process."""
    from imageserver.backends.file.image import ImageFiles  # noqa: PLC0415
    from imageserver.backends.file.pagecache import PageCache  # noqa: PLC0415

    pages = PageCache(keeps=settings.keep_page_cache)
    return ImageFiles(settings.chunk_size, settings.file_roots, pages)


def raw_opener(settings: "Settings", _holds: "Holds") -> "RawFiles":
    """Return what opens files that are disks, once per process."""
    from imageserver.backends.file.pagecache import PageCache  # noqa: PLC0415
    from imageserver.backends.file.raw import RawFiles  # noqa: PLC0415

    pages = PageCache(keeps=settings.keep_page_cache)
    return RawFiles(settings.chunk_size, settings.file_roots, pages)
