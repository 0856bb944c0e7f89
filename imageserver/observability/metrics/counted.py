# SPDX-License-Identifier: Apache-2.0
"""What a process counts: one object a process, over a file that /metrics adds up with others.

``stored`` keeps the numbers, ``layout`` knows their places. A request, a connection and a piece of
an image add to a number in memory, under a lock; nothing is looked up twice.
"""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from threading import Lock

from imageserver.core import errors
from imageserver.core.entry import Entry
from imageserver.core.slots import Holder, Kind
from imageserver.observability.metrics import declared
from imageserver.observability.metrics.declared import OTHER, Metric
from imageserver.observability.metrics.layout import ENDS, SUM, place_of
from imageserver.observability.metrics.stored import Store

#: Why a request is refused, by the error's class.
REFUSALS: dict[type[errors.ImageServerError], str] = {
    errors.BadRequest: "bad_request",
    errors.UnsupportedMediaType: "bad_request",
    errors.NotFound: "not_found",
    errors.UnknownImage: "unknown_image",
    errors.Unauthorized: "unauthorized",
    errors.MethodNotAllowed: "method_not_allowed",
    errors.RangeOutsideImage: "range_not_satisfiable",
    errors.DigestMismatch: "digest_mismatch",
    errors.PreconditionFailed: "precondition_failed",
    errors.ImageBusy: "image_busy",
    errors.StateUnavailable: "state_unavailable",
    errors.StateFull: "state_unavailable",
    errors.Exhausted: "server_busy",
}
#: ... and, for ``NoSlot``, by what was asked for.
NO_SLOT = {
    "read": "no_read_slot",
    "checksum": "no_read_slot",
    "qcow2": "no_read_slot",
    "write": "no_write_slot",
    "replace": "no_write_slot",
    "zero": "no_write_slot",
}
NO_IMAGE_SLOT = {operation: f"{reason}_of_image" for operation, reason in NO_SLOT.items()}
BACKEND_ERRORS: dict[type[errors.ImageServerError], str] = {
    errors.BackendError: "error",
    errors.BackendTimeout: "timeout",
    errors.ImageChanged: "error",
    errors.FileAccessError: "access",
    errors.NoSpace: "no_space",
}
CLIENT_ERRORS: tuple[type[errors.ImageServerError], ...] = (errors.ClientGone, errors.ShortBody)

_REFUSALS = {cls.__name__: reason for cls, reason in REFUSALS.items()}
_BACKEND_ERRORS = {cls.__name__: kind for cls, kind in BACKEND_ERRORS.items()}
_CLIENT_ERRORS = {cls.__name__ for cls in CLIENT_ERRORS}
_DIRECTIONS = {
    "read": "read",
    "qcow2": "read",
    "write": "write",
    "replace": "write",
    "zero": "zero",
}
#: Where an operation's durations are counted: their sum, and each bucket.
_DURATIONS = {
    operation: (
        place_of(declared.DURATION, operation, part=SUM),
        [place_of(declared.DURATION, operation, part=end) for end in ENDS],
    )
    for operation in declared.OPERATIONS
}


class Metrics:
    """The counters of this process; every method may be called from any thread."""

    def __init__(self, directory: str) -> None:
        """Count in a file of ``directory``, where that is possible."""
        self._store = Store(directory)

    def begin(self) -> None:
        """Take a file of this process's own now, not with the first thing that is counted."""
        self._store.flush()

    def path_of(self, name: str) -> str:
        """Return where this process may keep a file beside its counts; "": nowhere now."""
        return self._store.path_of(name)

    # Requests: ``ports.Journal``, ``ports.Meter``

    def finished(self, entry: Entry) -> None:
        """Count a finished request."""
        operation = entry.operation if entry.operation in declared.OPERATIONS else OTHER
        method = entry.method if entry.method in declared.METHODS else OTHER
        status = entry.status if 100 <= entry.status < 600 else 0  # noqa: PLR2004 - HTTP's
        sum_at, buckets_at = _DURATIONS[operation]
        self._store.add(
            (place_of(declared.REQUESTS, method, str(status)), 1),
            (buckets_at[bisect_left(declared.BUCKETS, entry.seconds)], 1),
            (sum_at, entry.seconds),
        )
        if entry.error:
            self._failed(entry, operation)

    def _failed(self, entry: Entry, operation: str) -> None:
        error = entry.error
        if error == errors.NoSlot.__name__:
            self.refused(NO_SLOT.get(operation, "table_full"))
        elif error == errors.NoImageSlot.__name__:
            self.refused(NO_IMAGE_SLOT.get(operation, "table_full"))
        elif error in _REFUSALS:
            self.refused(_REFUSALS[error])
            if error == errors.ImageBusy.__name__ and operation in declared.RUNNING:
                self._count(declared.CONFLICTS, operation)
        elif error in _CLIENT_ERRORS:
            self._count(declared.CLIENTS_GONE, operation)
        elif entry.backend in declared.BACKENDS:
            kind = _BACKEND_ERRORS.get(error, OTHER)
            self._count(declared.BACKEND_FAILURES, entry.backend, kind)

    def meter(self, operation: str, backend: str) -> Callable[[int], None]:
        """Return what is told of each piece that an operation has moved: see ``ports.Meter``."""
        direction = _DIRECTIONS.get(operation)
        if direction is None or backend not in declared.BACKENDS:
            return _uncounted
        place, add = place_of(declared.BYTES, direction, backend), self._store.add
        return lambda moved: add((place, moved))

    # What happens outside the application

    def refused(self, reason: str) -> None:
        """Count a request that was refused, for one of ``declared.REFUSALS``."""
        self._count(declared.REFUSED, reason)

    def freed(self, holder: Holder | None) -> None:
        """Count what a sweep has freed; None: a damaged record."""
        if holder is None:
            self._count(declared.RECLAIMED, "damaged")
        elif holder.kind is Kind.WORKER:
            self._count(declared.WORKER_DEATHS)
        else:
            self._count(declared.RECLAIMED, holder.kind.name.lower())

    def accepted(self) -> None:
        """Count a connection."""
        self._count(declared.CONNECTIONS)

    def turned_away(self, reason: str) -> None:
        """Count a connection refused for one of ``declared.CONNECTION_REFUSALS``."""
        self._count(declared.CONNECTIONS_REFUSED, reason)

    def tls_failed(self) -> None:
        """Count a failed handshake."""
        self._count(declared.TLS_FAILURES)

    def _count(self, metric: Metric, *labels: str) -> None:
        self._store.add((place_of(metric, *labels), 1))

    # Files

    def flush(self) -> None:
        """Write what was counted to the file, and what could not be written before."""
        self._store.flush()

    def flush_if_due(self) -> None:
        """Write what was counted, where that was done a moment ago or longer."""
        self._store.flush_if_due()

    def close(self) -> None:
        """Write what was counted and let the file go. Nothing can be counted any more."""
        self._store.close()


_making = Lock()
_made = cache(Metrics)


def metrics_in(directory: str) -> Metrics:
    """Return this process's metrics. One object, for two would write over each other's counts.

    A forked child may go on with its parent's: it notices, and takes files of its own.
    """
    with _making:
        return _made(directory)


def _uncounted(_count: int) -> None:
    pass
