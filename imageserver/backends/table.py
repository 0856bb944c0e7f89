# SPDX-License-Identifier: Apache-2.0
"""All kinds of images, with what opens them: a new back end is one package and one row here.

This module and each package's ``kind.py`` import no back end, so that imagectl can read them
where there is no libnbd. An opener imports its back end when the server calls it.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from imageserver.backends.file import kind as file
from imageserver.backends.nbd import kind as nbd
from imageserver.core.holds import Holds
from imageserver.core.kinds import Image, ImageKind, Kinds
from imageserver.core.ports import Backend, Backends, Check, Intent, no_client
from imageserver.core.transfer import Transfer

if TYPE_CHECKING:
    from imageserver.settings import Settings

#: What makes the ``ports.Backends`` of a kind, once per process.
TABLE: Mapping[ImageKind, "Callable[[Settings, Holds], Backends[Any]]"] = {
    nbd.NBD: nbd.opener,
    file.FILE: file.opener,
    file.RAW: file.raw_opener,
}

KINDS: Kinds = {kind.name: kind for kind in TABLE if kind.name == kind.backend}


class AnyBackend:
    """Opens images of every kind: ``ports.Backends``."""

    def __init__(self, settings: "Settings", holds: Holds) -> None:
        self._openers = {kind: opener(settings, holds) for kind, opener in TABLE.items()}

    def open(
        self,
        image: Image,
        intent: Intent,
        check: Check = no_client,
        transfer: Transfer | None = None,
    ) -> Backend:
        """Open an image: see ``ports.Backends``."""
        return self._openers[image.kind].open(image, intent, check, transfer)

    def settle(self, image: Image, check: Check = no_client) -> None:
        """Wait for what a dead holder left under way: see ``ports.Backends``."""
        self._openers[image.kind].settle(image, check)

    def drain(self) -> None:
        """Keep nothing open any more: see ``ports.Backends``."""
        for opener in self._openers.values():
            opener.drain()
