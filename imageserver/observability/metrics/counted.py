# SPDX-License-Identifier: Apache-2.0
"""What a process counts: one object a process, over files that /metrics adds up.

Each value has its place in a file (``stored``), so that it outlives the process. ``numbers`` says
which files.

To write one costs microseconds, and a request has a handful of them: a tenth of a probe. So
finished requests are added up in memory, and written at most ``FLUSH_SECONDS`` later; what is
rarer or larger, at once.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from itertools import product
from threading import Lock
from typing import Any

from prometheus_client import Counter, values
from prometheus_client.utils import floatToGoString

from imageserver.core import errors
from imageserver.core.entry import Entry
from imageserver.core.slots import Holder, Kind
from imageserver.observability.metrics import declared
from imageserver.observability.metrics.declared import OTHER, Metric
from imageserver.observability.metrics.stored import Store

#: Why a request is refused, by the error's class.
REFUSALS: dict[type[errors.ImageServerError], str] = {
    errors.BadRequest: "bad_request",
    errors.UnsupportedMediaType: "bad_request",
    errors.NotFound: "not_found",
    errors.UnknownImage: "unknown_image",
    errors.MethodNotAllowed: "method_not_allowed",
    errors.RangeOutsideImage: "range_not_satisfiable",
    errors.ImageBusy: "image_busy",
    errors.StateUnavailable: "state_unavailable",
    errors.StateFull: "state_unavailable",
    errors.Exhausted: "server_busy",
}
#: ... and, for ``NoSlot``, by what was asked for.
NO_SLOT = {
    "read": "no_read_slot",
    "write": "no_write_slot",
    "replace": "no_write_slot",
    "zero": "no_write_slot",
}
BACKEND_ERRORS: dict[type[errors.ImageServerError], str] = {
    errors.BackendError: "error",
    errors.BackendTimeout: "timeout",
    errors.FileAccessError: "access",
    errors.NoSpace: "no_space",
}
CLIENT_ERRORS: tuple[type[errors.ImageServerError], ...] = (errors.ClientGone, errors.ShortBody)

#: How long a finished request may be missing from the files. A process killed takes it along.
FLUSH_SECONDS = 0.25

_REFUSALS = {cls.__name__: reason for cls, reason in REFUSALS.items()}
_BACKEND_ERRORS = {cls.__name__: kind for cls, kind in BACKEND_ERRORS.items()}
_CLIENT_ERRORS = {cls.__name__ for cls in CLIENT_ERRORS}
_DIRECTIONS = {"read": "read", "write": "write", "replace": "write", "zero": "zero"}


class Metrics:
    """The counters of this process; every method may be called from any thread."""

    def __init__(self, directory: str) -> None:
        """Count in files of ``directory``, where that is possible."""
        self._store = Store(directory)
        # The library asks for this name whenever it makes a value.
        values.ValueClass = self._store.value
        self._requests = _counter(declared.REQUESTS)
        self._durations = {
            operation: _Durations(self._store.value, operation) for operation in declared.OPERATIONS
        }
        self._bytes = _counter(declared.BYTES)
        self._refused = _counter(declared.REFUSED)
        self._conflicts = _counter(declared.CONFLICTS)
        self._backend_failures = _counter(declared.BACKEND_FAILURES)
        self._clients_gone = _counter(declared.CLIENTS_GONE)
        self._reclaimed = _counter(declared.RECLAIMED)
        self._worker_deaths = _counter(declared.WORKER_DEATHS)
        self._connections = _counter(declared.CONNECTIONS)
        self._connections_refused = _counter(declared.CONNECTIONS_REFUSED)
        self._tls_failures = _counter(declared.TLS_FAILURES)
        self._pending = Lock()
        self._due = 0.0
        self._ended: dict[tuple[str, int], int] = {}
        self._took = _no_times()

    def begin(self) -> None:
        """Take files of this process's own now, not with the first thing that is counted."""
        self._connections.inc(0)

    # Requests: ``ports.Journal``, ``ports.Meter``

    def finished(self, entry: Entry) -> None:
        """Count a finished request."""
        operation = entry.operation if entry.operation in declared.OPERATIONS else OTHER
        ended = entry.method if entry.method in declared.METHODS else OTHER, entry.status
        with self._pending:
            self._ended[ended] = self._ended.get(ended, 0) + 1
            self._took[operation].add(entry.seconds)
        if entry.error:
            self._failed(entry, operation)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Write finished requests to the files, where that was done a moment ago or longer."""
        if time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """Write finished requests to the files, and what could not be written before."""
        self._store.mend()
        with self._pending:
            self._due = time.monotonic() + FLUSH_SECONDS
            if not self._ended:
                return
            ended, self._ended = self._ended, {}
            took, self._took = self._took, _no_times()
        for (method, status), number in ended.items():
            self._requests.labels(method, str(status)).inc(number)
        for operation, times in took.items():
            self._durations[operation].add(times)

    def _failed(self, entry: Entry, operation: str) -> None:
        error = entry.error
        if error == errors.NoSlot.__name__:
            self.refused(NO_SLOT.get(operation, "table_full"))
        elif error in _REFUSALS:
            self.refused(_REFUSALS[error])
            if error == errors.ImageBusy.__name__ and operation in declared.RUNNING:
                self._conflicts.labels(operation).inc()
        elif error in _CLIENT_ERRORS:
            self._clients_gone.labels(operation).inc()
        elif entry.backend in declared.BACKENDS:
            kind = _BACKEND_ERRORS.get(error, OTHER)
            self._backend_failures.labels(entry.backend, kind).inc()

    def meter(self, operation: str, backend: str) -> Callable[[int], None]:
        """Return what is told of each piece that an operation has moved: see ``ports.Meter``."""
        direction = _DIRECTIONS.get(operation)
        if direction is None or backend not in declared.BACKENDS:
            return _uncounted
        return self._bytes.labels(direction, backend).inc

    # What happens outside the application

    def refused(self, reason: str) -> None:
        """Count a request that was refused, for one of ``declared.REFUSALS``."""
        self._refused.labels(_known(reason, declared.REFUSALS)).inc()

    def freed(self, holder: Holder | None) -> None:
        """Count what a sweep has freed; None: a damaged record."""
        if holder is None:
            self._reclaimed.labels("damaged").inc()
        elif holder.kind is Kind.WORKER:
            self._worker_deaths.inc()
        else:
            self._reclaimed.labels(holder.kind.name.lower()).inc()

    def accepted(self) -> None:
        """Count a connection."""
        self._connections.inc()

    def turned_away(self, reason: str) -> None:
        """Count a connection refused for one of ``declared.CONNECTION_REFUSALS``."""
        self._connections_refused.labels(_known(reason, declared.CONNECTION_REFUSALS)).inc()

    def tls_failed(self) -> None:
        """Count a failed handshake."""
        self._tls_failures.inc()

    def close(self) -> None:
        """Let the files go. Nothing can be counted any more."""
        self.flush()
        self._store.close()


class _Times:
    """Durations of one operation, by bucket, and their sum."""

    def __init__(self) -> None:
        self.numbers = [0] * (len(declared.BUCKETS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.numbers[bisect_left(declared.BUCKETS, seconds)] += 1
        self.seconds += seconds


def _no_times() -> dict[str, _Times]:
    return {operation: _Times() for operation in declared.OPERATIONS}


class _Durations:
    """One operation's part of the histogram. The library's own takes durations one by one."""

    def __init__(self, make: Callable[..., Any], operation: str) -> None:
        metric = declared.DURATION
        names, labels = metric.label_names, (operation,)
        fixed = (metric.type.value, metric.name)
        self._sum = make(*fixed, f"{metric.name}_sum", names, labels, metric.help)
        self._buckets = [
            make(
                *fixed,
                f"{metric.name}_bucket",
                (*names, "le"),
                (*labels, floatToGoString(end)),  # type: ignore[no-untyped-call]
                metric.help,
            )
            for end in (*declared.BUCKETS, math.inf)
        ]

    def add(self, times: _Times) -> None:
        for bucket, number in zip(self._buckets, times.numbers, strict=True):
            if number:
                bucket.inc(number)
        if times.seconds:
            self._sum.inc(times.seconds)


class LateMetrics:
    """A process's metrics for an application that is made before there is a place to count in.

    So it is where gunicorn preloads the application: the master has not checked anything yet.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def finished(self, entry: Entry) -> None:
        """Count a finished request."""
        metrics_in(self._directory).finished(entry)

    def meter(self, operation: str, backend: str) -> Callable[[int], None]:
        """Return what is told of each piece that an operation has moved."""
        return metrics_in(self._directory).meter(operation, backend)

    def freed(self, holder: Holder | None) -> None:
        """Count what a sweep has freed."""
        metrics_in(self._directory).freed(holder)

    def flush(self) -> None:
        """Write what could not be written before."""
        metrics_in(self._directory).flush()


_making = Lock()
_made = cache(Metrics)


def metrics_in(directory: str) -> Metrics:
    """Return this process's metrics. One object, for two would write over each other's counts.

    A forked child may go on with its parent's: it notices, and takes files of its own.
    """
    with _making:
        return _made(directory)


def _counter(metric: Metric) -> Counter:
    counter = Counter(metric.name, metric.help, metric.label_names, registry=None)
    # Each value that is known beforehand begins with a zero.
    sets = [found for _, found in metric.labels if found is not None]
    if metric.labels and len(sets) == len(metric.labels):
        for labels in product(*sets):
            counter.labels(*labels)
    return counter


def _known(value: str, among: tuple[str, ...]) -> str:
    if value not in among:
        raise ValueError(f"{value} is not declared")
    return value


def _uncounted(_count: int) -> None:
    pass
