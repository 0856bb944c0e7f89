# SPDX-License-Identifier: Apache-2.0
"""Files as a kind of image: what a transfer says of one, what can be done with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imageserver.backends.paths import resolved
from imageserver.core.kinds import ImageInfo, ImageKind
from imageserver.core.transfer import parse_path

if TYPE_CHECKING:
    from imageserver.backends.file.image import ImageFiles
    from imageserver.core.holds import Holds
    from imageserver.settings import Settings


@dataclass(frozen=True, slots=True)
class FileImage:
    """The bytes of a file or block device."""

    path: str
    at: bytes | None = field(default=None, compare=False)
    """The path without links, of an image that is pinned."""

    @property
    def kind(self) -> ImageKind:
        """What can be done with it."""
        return FILE

    def fields(self) -> dict[str, object]:
        """Return its fields in a transfer's object."""
        return {"file": self.path}

    def identity(self) -> Sequence[bytes]:
        """Return the path without links."""
        return (self.at or resolved(self.path),)

    def pinned(self) -> "FileImage":
        """Return the image at the file to which links lead now."""
        return FileImage(self.path, resolved(self.path))

    def stamp(self) -> None:
        """Return None: no server is between us and the file."""

    def __str__(self) -> str:
        return self.path


def _parse(fields: Mapping[str, object]) -> FileImage:
    return FileImage(parse_path(fields, "file"))


FILE = ImageKind(
    name="file",
    own_fields=("file",),
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


def opener(settings: "Settings", _holds: "Holds") -> "ImageFiles":
    """Return what opens image files, once per process."""
    from imageserver.backends.file.image import ImageFiles  # noqa: PLC0415

    return ImageFiles(settings.chunk_size, settings.file_roots)
