# SPDX-License-Identifier: Apache-2.0
"""Kinds of images: one declaration says what can be done with all images of a kind.

Each back end's package declares its kinds in ``kind.py``, and ``backends/table.py`` lists them.
What depends on the kind is read from ``image.kind``: methods, OPTIONS, refusals, sharing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from imageserver.core.validators import UNKNOWN_STATE, Validators


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image can do, as its back end says."""

    size: int
    read_only: bool
    can_zero: bool
    can_flush: bool
    multi_conn: bool = False  # several connections may write at once
    flushes_image: bool = False  # a flush covers what other connections have written
    state: Validators | None = UNKNOWN_STATE  # None: there is no image yet
    identity: tuple[int, ...] = ()  # of the file or server that is open; another may take its place


class Image(Protocol):
    """What a transfer gives a right to: a value, equal to and hashed like any other of its fields.

    ``str()`` names it for operators.
    """

    @property
    def kind(self) -> "ImageKind":
        """What can be done with it."""
        ...

    def fields(self) -> dict[str, object]:
        """Return the fields of a transfer's object from which ``kind.parse`` makes this image."""
        ...

    def identity(self) -> Sequence[bytes]:
        """Return what two images of a kind have in common exactly if they must share a lock."""
        ...

    def pinned(self) -> "Image":
        """Return an equal image that stays at what ``identity`` is now, wherever links lead later.

        A lock is taken by the identity; what is opened under it must be that very image.
        """
        ...

    def stamp(self) -> object:
        """Return what changes when another server answers for the image; None: no server does."""
        ...


@dataclass(frozen=True, slots=True)
class Announcement:
    """What OPTIONS says of an image (docs/api.md)."""

    features: tuple[str, ...]
    methods: tuple[str, ...]
    writers: int


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageKind:
    """What can be done with images of one kind, and the words in which the rest is refused."""

    name: str
    """The ``backend`` of log lines and metrics; of transfers too, unless ``backend`` is another."""
    backend: str = ""
    """The transfer's ``backend``; kinds that have it in common share locks, and ``parse``."""
    own_fields: tuple[str, ...]
    """The fields of a transfer's object that only this kind has."""
    parse: Callable[[Mapping[str, object]], Image]
    """Makes an image of a transfer's object; raises ``InvalidTransfer``."""
    methods: tuple[str, ...]
    """As OPTIONS announces them, of an image that may be written."""
    read_only_methods: tuple[str, ...]
    """... and of one that may only be read."""
    features: tuple[str, ...]
    """What OPTIONS announces; ``zero`` and ``flush`` only where the image has them."""
    read_only_features: tuple[str, ...]
    patch_refusal: str = ""
    """What PATCH is told (400) where the kind has no range writes; then PUT has none either."""
    extents_refusal: str = ""
    """What GET of the extents is told (400) where the kind has none."""
    qcow2_refusal: str = ""
    """What a request for a qcow2 file is told (400) where the kind has no extents to make it of."""
    has_fixed_size: bool
    """A PUT must bring exactly as many bytes as the image has."""
    shares_writers: bool
    """Range writes, zero and flush may run side by side, where ``ImageInfo.multi_conn`` says so."""
    asks_server: bool
    """A server must be asked what an image can do, and may be silent: probes share one query.

    Otherwise HEAD, and OPTIONS that ``looks``, need no more than a system call or two.
    """
    looks: bool = False
    """Without a server, OPTIONS looks at the image itself; otherwise it answers ``assumed``."""
    assumed: ImageInfo
    """What OPTIONS assumes of an image that it cannot ask, or need not."""

    def __post_init__(self) -> None:
        """Fill ``backend`` in."""
        object.__setattr__(self, "backend", self.backend or self.name)

    @property
    def writes_ranges(self) -> bool:
        """Parts of an image may be written."""
        return not self.patch_refusal

    def announcement(self, info: ImageInfo, max_writers: int, *, read_only: bool) -> Announcement:
        """Return what OPTIONS says of an image; ``read_only``: its transfer forbids writing."""
        if read_only or info.read_only:
            return Announcement(self.read_only_features, self.read_only_methods, 0)
        lacks = {"zero": not info.can_zero, "flush": not info.can_flush}
        features = tuple(name for name in self.features if not lacks.get(name))
        may_share = self.shares_writers and info.multi_conn
        return Announcement(features, self.methods, max_writers if may_share else 1)


#: Kinds by their ``backend``, of several the one whose ``parse`` makes images of all. The first is
#: what a transfer means that names none.
Kinds = Mapping[str, ImageKind]
