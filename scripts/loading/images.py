# SPDX-License-Identifier: Apache-2.0
"""Images of a run: what each must contain. No HTTP here.

What an image contains is known from a file, or because a restore writer has written all of it:
then a ``Model`` follows it. What is not known is only checked for its length.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from lab.model import Model, Read, WrongBytes

from loading.ledger import Image as Lockable

#: As much of an image to write as is used: its model is in memory, twice or more while it is read.
WINDOW = 64 << 20


@dataclass(slots=True)
class Image:
    """An image under load."""

    id: str
    lockable: Lockable
    size: int
    """Bytes that are used, from the first on; all of it but for large NBD images to write."""
    is_whole: bool
    """All of it is used."""
    content: bytes | None = None
    """What it contains, if that never changes."""
    model: Model | None = None
    """What it may contain, if it is written."""
    base: bytes | None = None
    """What it contained when its bitmap was made."""
    surveyed: set[bytes] = field(default_factory=set)
    """Extents that were found right, of an image that never changes."""

    @property
    def is_nbd(self) -> bool:
        """Tell whether it has extents, and can be written in part."""
        return self.lockable.is_nbd

    @property
    def path(self) -> str:
        """Its path on the server."""
        return f"/images/{self.id}"

    def reading(self, start: int, stop: int) -> AbstractContextManager[Read | None]:
        """Note a read for the block; None where that makes no difference."""
        return self.model.reading(start, stop) if self.model else nullcontext()

    def check(self, read: Read | None, start: int, stop: int, data: bytes) -> None:
        """Check what a read of [start, stop) has brought.

        Raises:
            WrongBytes: it is too short or too long, or not what the image may contain.
        """
        if len(data) != stop - start:
            raise WrongBytes(f"{len(data)} bytes instead of {stop - start}")
        if self.content is not None and not self.content.startswith(data, start):
            raise WrongBytes(f"wrong from byte {_difference(self.content, data, start)} on")
        if self.model and read:
            self.model.check(read, data)

    def check_zero(self, read: Read | None, start: int, stop: int) -> None:
        """Check that [start, stop), said to read as zeros, may be zeros.

        Raises:
            WrongBytes: there is data.
        """
        if self.content is not None and self.content.count(0, start, stop) < stop - start:
            raise WrongBytes(f"extents: data in [{start}, {stop}), which is said to be zero")
        if self.model and read:
            self.model.check_zero(read, start, stop)

    def check_clean(self, start: int, stop: int) -> None:
        """Check that [start, stop), said to be clean, is what it was before.

        Raises:
            WrongBytes: it has changed.
        """
        if self.content is None or self.base is None:
            return
        if not self.content.startswith(self.base[start:stop], start):
            raise WrongBytes(f"extents: changed, but not dirty: [{start}, {stop})")


def _difference(content: bytes, data: bytes, start: int) -> int:
    """Return where the first wrong byte is."""
    pairs = enumerate(zip(content[start:], data, strict=False))
    return start + next((at for at, (due, seen) in pairs if due != seen), len(data))


def needed(extents: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) that a backup must read: not zero, and dirty if told."""
    return [
        (extent["start"], extent["start"] + extent["length"])
        for extent in extents
        if extent.get("dirty", True) and not extent["zero"]
    ]


def pieces(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Cut ranges into pieces of at most ``size`` bytes."""
    return [(at, min(stop, at + size)) for start, stop in ranges for at in range(start, stop, size)]
