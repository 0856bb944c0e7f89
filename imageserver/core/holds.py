# SPDX-License-Identifier: Apache-2.0
"""Protocols between those who keep connections and the transfers on whose behalf they do."""

from collections.abc import Collection
from typing import Protocol

from imageserver.core.transfer import Transfer


class Hold(Protocol):
    """A transfer on whose behalf a connection is kept: who unregisters it waits for ``close``."""

    def is_current(self) -> bool:
        """Tell whether the transfer still says what it said."""
        ...

    def close(self) -> None:
        """Say that the connection has been closed. Never fails, may be called twice."""
        ...


class Holds(Protocol):
    """What processes share about connections that they keep: for which transfers, and where."""

    def hold(self, transfer: Transfer) -> Hold | None:
        """Hold a transfer; None: it has ended, or says something else now."""
        ...

    def turned_away(self, server: tuple[int, ...]) -> None:
        """Tell every process that an NBD server has no room to spare."""
        ...

    def without_room(self, servers: Collection[tuple[int, ...]]) -> set[tuple[int, ...]]:
        """Return at which of some NBD servers another process was turned away."""
        ...
