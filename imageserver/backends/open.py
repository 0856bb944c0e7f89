# SPDX-License-Identifier: Apache-2.0
"""From an image to its back end: the one place that knows them all."""

import os

from imageserver.backends.file.image import ImageFiles
from imageserver.backends.nbd.exports import NbdExports
from imageserver.core.ports import Backend, Check, Intent, no_client
from imageserver.core.transfer import FileImage, Image, NbdImage, path_bytes


class AnyBackend:
    """Opens whatever an image is: ``ports.Backends``."""

    def __init__(self, nbd: NbdExports, file: ImageFiles) -> None:
        self._nbd = nbd
        self._file = file

    def open(self, image: Image, intent: Intent, check: Check = no_client) -> Backend:
        """Open an image: see ``ports.Backends``."""
        if isinstance(image, FileImage):
            return self._file.open(image, intent)
        return self._nbd.open(image, intent, check)

    def settle(self, image: Image, check: Check = no_client) -> None:
        """Wait for what a dead holder left under way: see ``ports.Backends``."""
        if isinstance(image, NbdImage):
            self._nbd.settle(image, check)


def stamp(image: Image) -> object:
    """Return something that changes when another server listens at an image's socket."""
    if isinstance(image, FileImage):
        return None
    try:
        found = os.stat(path_bytes(image.socket))
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
