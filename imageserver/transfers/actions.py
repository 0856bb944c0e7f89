# SPDX-License-Identifier: Apache-2.0
"""What a control program can ask for: register, unregister, status, list.

Any worker can do it for all, since registrations and records of use are files.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

from imageserver.core import control_protocol
from imageserver.core.control_protocol import Command, List, Register, Status, Unregister
from imageserver.core.errors import UnknownImage
from imageserver.core.ports import Activities, Activity, Owned, Registrations
from imageserver.core.transfer import InvalidTransfer, is_valid_id
from imageserver.transfers.lookup import Catalogue

_POLL_SECONDS = 0.02
#: A forced end takes at most so long; a shorter timeout would answer busy for no reason.
_FORCE_SECONDS = 1.0
#: Kept connections are closed within a look at them (``backends/nbd/pool.py``), and a good-bye.
_HELD_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Administration:
    """Carries commands out. Thread-safe.

    ``default_idle`` and ``default_wait`` are seconds, for a command to register that says no idle
    timeout, and one to unregister that says no timeout.
    """

    registrations: Registrations
    activities: Activities
    catalogue: Catalogue
    default_idle: int
    sleep: Callable[[float], None] = time.sleep
    default_wait: float = math.inf

    def run(self, command: Command, is_wanted: Callable[[], bool]) -> bytes:
        """Carry a command out and return the answer; waits only while ``is_wanted``."""
        if isinstance(command, Status):
            return self._status(command)
        if isinstance(command, Register):
            return self._register(command)
        if isinstance(command, List):
            return self._list(command)
        return self._unregister(command, is_wanted)

    def _status(self, command: Status) -> bytes:
        if command.transfer_id is None:
            return control_protocol.succeeded(self.registrations.count())
        try:
            found = self.catalogue.find(command.transfer_id, visit=False)
        except UnknownImage:
            return control_protocol.failed("unknown transfer_id")
        report = _report(found.activity)
        return control_protocol.succeeded(self.registrations.count(), **report)

    def _register(self, command: Register) -> bytes:
        transfer = command.transfer
        if transfer.idle_seconds is None:
            transfer = replace(transfer, idle_seconds=self.default_idle)
        try:
            self.registrations.store(transfer)
        except InvalidTransfer as exc:
            return control_protocol.failed(f"invalid config: {exc}")
        warnings = {"warnings": transfer.ignored} if transfer.ignored else {}
        return control_protocol.succeeded(self.registrations.count(), **warnings)

    def _list(self, command: List) -> bytes:
        known = self.registrations.all()
        beyond = (transfer for transfer in known if transfer.id > command.after)
        return control_protocol.succeeded(len(known), **control_protocol.page(beyond))

    def _unregister(self, command: Unregister, is_wanted: Callable[[], bool]) -> bytes:
        if not is_valid_id(command.transfer_id):  # unknown, as any other that never was
            return control_protocol.succeeded(
                self.registrations.count(), warnings=["no transfer can have this id"]
            )
        self.registrations.remove(command.transfer_id)
        activity = self.activities.find(Owned.REGISTERED, command.transfer_id, visit=False)
        if activity:
            with closing(activity):
                if command.force:
                    activity.cut()
                ended = self._has_ended(activity, command, is_wanted)
                if not (ended and self._is_let_go(activity)):
                    return self._still_busy(command)
            self.registrations.forget(command.transfer_id)
        return control_protocol.succeeded(self.registrations.count())

    def _has_ended(
        self, activity: Activity, command: Unregister, is_wanted: Callable[[], bool]
    ) -> bool:
        """Wait until no request uses the transfer; False where that took too long."""
        seconds = self.default_wait if command.timeout is None else command.timeout
        least = _FORCE_SECONDS if command.force else 0.0
        deadline = time.monotonic() + max(seconds, least)
        while activity.visitors():
            if not is_wanted() or time.monotonic() >= deadline:
                return False
            self.sleep(_POLL_SECONDS)
        return True

    def _still_busy(self, command: Unregister) -> bytes:
        """Tell that requests go on: an error only for who asked for a bound."""
        if command.timeout is None:
            return control_protocol.succeeded(self.registrations.count(), busy=True)
        return control_protocol.failed("busy")

    def _is_let_go(self, activity: Activity) -> bool:
        """Wait until no worker keeps a connection to the image's server for the transfer.

        Whatever timeout the command has: nobody uses such a connection, and it is gone in no time.
        """
        deadline = time.monotonic() + _HELD_SECONDS
        while activity.is_held():
            if time.monotonic() >= deadline:
                return False
            self.sleep(_POLL_SECONDS)
        return True


def _report(activity: Activity | None) -> dict[str, object]:
    """Return what a control program polls; nulls where the use is not recorded."""
    if activity is None:
        names = ("bytes_read", "bytes_written", "idle_seconds", "last_error", "requests_in_flight")
        return dict.fromkeys(names)
    with closing(activity):
        account, visitors = activity.account(), activity.visitors()
        idle = 0.0 if visitors else round(activity.idle_ns() / 1e9, 3)
    return {
        "requests_in_flight": visitors,
        "bytes_read": account.bytes_read,
        "bytes_written": account.bytes_written,
        "last_error": account.last_error,
        "idle_seconds": idle,
    }
