# SPDX-License-Identifier: Apache-2.0
"""From an id to its transfer: registrations first, then the control program's files."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from imageserver.core.errors import StateUnavailable, UnknownImage
from imageserver.core.ports import Activities, Activity, Owned, Transfers
from imageserver.core.transfer import Transfer, is_valid_id, overdue_ns
from imageserver.transfers.fileage import FileAge


class Found(NamedTuple):
    """A transfer that counts now; ``activity`` where it can expire."""

    transfer: Transfer
    activity: Activity | None


class Catalogue:
    """All transfers: those registered, then those of the control program's files."""

    def __init__(
        self,
        files: Transfers,
        registered: Transfers | None,
        activities: Activities,
        ages: FileAge | None = None,
        require: Callable[[], None] = lambda: None,
    ) -> None:
        """``registered`` is None where nothing can be registered.

        ``require`` raises ``StateUnavailable`` where what is registered, and what is in use, are
        not what other processes see.
        """
        self._require = require
        self._files = files
        self._registered = registered
        self._activities = activities
        self._ages = ages or FileAge()

    def find(self, transfer_id: str, *, visit: bool = True, probes: bool = False) -> Found:
        """Look an id up; ``visit``: as one who uses it, and closes the activity afterwards.

        ``probes``: as one who touches no image, and for whom a control program's file will do
        where it cannot be told what is registered, or its use not be noted.

        Raises:
            UnknownImage: nothing, or nothing that has not expired, has this id.
            StateUnavailable: that cannot be told.
        """
        if not is_valid_id(transfer_id):
            raise UnknownImage(transfer_id)
        try:
            return self._find_registered(transfer_id, visit) or self._find_file(transfer_id, visit)
        except StateUnavailable:
            if probes:
                with contextlib.suppress(UnknownImage):
                    return Found(self._files.get(transfer_id), None)
            raise

    def _find_registered(self, transfer_id: str, visit: bool) -> Found | None:  # noqa: FBT001
        if self._registered is None:
            return None
        self._require()
        # In this order: see registered.py.
        activity = self._activities.find(Owned.REGISTERED, transfer_id, visit=visit)
        if activity is None:
            return None
        with contextlib.ExitStack() as held:
            held.callback(activity.close)
            try:
                transfer = self._registered.get(transfer_id)
            except UnknownImage:
                return None
            # Registering is use, so the time of the file itself does not count.
            _check(transfer, activity.idle_ns(), activity)
            held.pop_all()
        return Found(replace(transfer, id=transfer_id), activity)

    def _find_file(self, transfer_id: str, visit: bool) -> Found:  # noqa: FBT001
        transfer = self._files.get(transfer_id)
        if transfer.idle_seconds is None:
            return Found(transfer, None)
        self._require()
        activity = self._activities.find(Owned.FILE, transfer_id, visit=visit)
        with contextlib.ExitStack() as held:
            if activity:
                held.callback(activity.close)
            _check(transfer, self._unused_ns(transfer, activity), activity)
            if activity is None:
                activity = self._activities.make(Owned.FILE, transfer.id)
                held.callback(activity.close)
            if visit and activity.changed_ns != transfer.changed_ns:
                activity.changed_ns = transfer.changed_ns
            held.pop_all()
        return Found(transfer, activity)

    def _unused_ns(self, transfer: Transfer, activity: Activity | None) -> int:
        """Return for how long nobody has used a file's transfer. A changed file begins anew.

        Its age counts only until it is used: then that is known, by a clock which nobody sets.
        """
        if activity is None:
            return self._ages.age_ns(transfer.changed_ns)
        if activity.changed_ns == transfer.changed_ns:
            return activity.idle_ns()
        return min(self._ages.age_ns(transfer.changed_ns), activity.idle_ns())


def _check(transfer: Transfer, unused_ns: int, activity: Activity | None) -> None:
    over_ns = overdue_ns(transfer, unused_ns)
    # A request in flight notes its use, unless its worker is stopped. One that has come since,
    # as we have, does not count: two of them would let each other in.
    if over_ns is not None and not (activity and activity.visitors(over_ns)):
        raise UnknownImage(transfer.id)
