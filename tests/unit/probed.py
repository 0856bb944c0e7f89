# SPDX-License-Identifier: Apache-2.0
"""Back ends that are asked what an image is: what ``images.probing`` sees of them."""

from collections.abc import Callable

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import Intent
from imageserver.images.probing import MEMORY_SECONDS, Asking, Inspector

DISK = NbdImage("/run/disk.sock")
OTHER = NbdImage("/run/other.sock")
FILE = FileImage("/images/disk.raw")


class Probed:
    """Back ends whose images grow by one byte with every query; also a clock and a stamp."""

    def __init__(self) -> None:
        self.opened: list[Image] = []
        self.closed = 0
        self.seconds = 100.0
        self.stamp: object = "first"
        self.before: Callable[[], None] = lambda: None
        self.inspector = Inspector(self, lambda _: self.stamp, lambda: self.seconds)
        self.size = 0

    def open(self, image: Image, intent: Intent) -> "Probed":
        assert intent is Intent.INSPECT
        self.opened.append(image)
        self.size = len(self.opened)
        self.before()
        return self

    def settle(self, _image: Image) -> None:
        raise AssertionError

    @property
    def info(self) -> ImageInfo:
        return ImageInfo(self.size, read_only=False, can_zero=True, can_flush=True)

    def close(self) -> None:
        self.closed += 1

    def ask(
        self, max_age: float = MEMORY_SECONDS, image: Image = DISK, asking: Asking = Asking.NOW
    ) -> int:
        return self.inspector.inspect(image, max_age, asking).size


def failing(error: BaseException) -> Callable[[], None]:
    """Return what a query does that fails."""

    def fail() -> None:
        raise error

    return fail
