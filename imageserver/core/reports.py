# SPDX-License-Identifier: Apache-2.0
"""Protocols of what counts, shows and logs requests."""

from collections.abc import Callable
from typing import Protocol

from imageserver.core.entry import Entry
from imageserver.core.ranges import Span
from imageserver.core.slots import Holder, Kind


class Meter(Protocol):
    """Counts the bytes of images, as they move."""

    def meter(self, operation: str, backend: str) -> Callable[[int], None]:
        """Return what an operation tells of each piece, in bytes. Quick, never fails."""
        ...


class Living(Protocol):
    """The slot table, as ``/status`` and metrics show it."""

    def living(self, *kinds: Kind) -> list[Holder]:
        """Return the rows of these kinds whose processes live."""
        ...


class Journal(Protocol):
    """Is told of each finished request: the log, the metrics."""

    def finished(self, entry: Entry) -> None:
        """Take an entry. Quick, never fails; called from any thread."""
        ...


class Underway(Protocol):
    """A request that has begun to use its image."""

    span: Span | None
    done: int
    """Bytes of the span."""

    @property
    def transfer_id(self) -> str:
        """The id that was asked for."""
        ...

    @property
    def operation(self) -> str:
        """What a session was asked for."""
        ...
