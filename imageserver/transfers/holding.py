# SPDX-License-Identifier: Apache-2.0
"""Transfers on whose behalf a worker keeps connections to NBD servers.

A registered transfer's file of use shows that to all processes, so that who unregisters it can
wait (``actions.py``). A request puts its hold there while its own visit is on: who has seen the
last visit end sees every hold. Files of the control program end without a word: who keeps a
connection looks, and nobody waits.
"""

import contextlib
from collections.abc import Collection
from dataclasses import dataclass

from imageserver.core.errors import StateUnavailable, UnknownImage
from imageserver.core.ports import Activity
from imageserver.core.transfer import Transfer
from imageserver.runtime.marks import Marks
from imageserver.transfers.lookup import Catalogue, Found


@dataclass(frozen=True, slots=True)
class Held:
    """One kept connection's hold on its transfer: ``holds.Hold``."""

    transfer: Transfer
    activity: Activity | None
    catalogue: Catalogue

    def is_current(self) -> bool:
        """Tell whether the transfer still says what it said."""
        found = _find(self.catalogue, self.transfer.id)
        if found is None:
            return False
        if found.activity:
            found.activity.close()
        return found.transfer.is_still(self.transfer)

    def close(self) -> None:
        """Let the transfer go. Never fails, may be called twice."""
        if self.activity:
            self.activity.close()


class Holding:
    """Holds transfers that can be found: ``holds.Holds``."""

    def __init__(self, catalogue: Catalogue, marks: Marks) -> None:
        self._catalogue = catalogue
        #: NBD servers that have turned a process away.
        self._marks = marks

    def hold(self, transfer: Transfer) -> Held | None:
        """Hold a transfer; None: it has ended, or says something else now."""
        found = _find(self._catalogue, transfer.id)
        if found is None:
            return None
        activity = found.activity
        with contextlib.ExitStack() as opened:
            if activity:
                opened.callback(activity.close)
            if not found.transfer.is_still(transfer):
                return None
            if activity:
                try:
                    activity.hold()
                except StateUnavailable:
                    return None
            opened.pop_all()
        return Held(transfer, activity, self._catalogue)

    def turned_away(self, server: tuple[int, ...]) -> None:
        """Tell every process that an NBD server has no room to spare."""
        self._marks.add(server)

    def without_room(self, servers: Collection[tuple[int, ...]]) -> set[tuple[int, ...]]:
        """Return at which of some NBD servers another process was turned away."""
        return self._marks.among(servers)


def _find(catalogue: Catalogue, transfer_id: str) -> Found | None:
    """Look a transfer up without using it; None where it has ended, or that cannot be told."""
    try:
        return catalogue.find(transfer_id, visit=False)
    except (UnknownImage, StateUnavailable):
        return None
