# SPDX-License-Identifier: Apache-2.0
"""What /metrics shows: the counts of all processes added up, and gauges of what runs now.

Gauges are never stored. They are read from the slot table when they are asked for, as rows of
processes that live, so that nothing remains of one that has died.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from imageserver import __version__
from imageserver.core.entry import Exposition
from imageserver.core.reports import Living
from imageserver.core.slots import Holder, Kind
from imageserver.core.workers import WorkerState
from imageserver.observability.metrics import declared
from imageserver.observability.metrics.declared import Metric, Type
from imageserver.observability.metrics.layout import (
    COUNTED,
    ENDS,
    SUM,
    Counts,
    add_up,
    counts_of,
    labels_of,
    place_of,
)
from imageserver.observability.metrics.numbers import read_all

_LIMITED = (Kind.READ, Kind.WRITE, Kind.OTHER)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where metrics come from."""

    directory: str
    """Of the files of counts."""
    table: Living
    limits: Mapping[Kind, int]
    image_limits: Mapping[Kind, int]
    """How many of these one image may have, where that is less."""
    threads: int
    """Of each worker."""
    checks: Mapping[str, Callable[[], str]]


def exposition(sources: Sources) -> Exposition:
    """Return everything as text."""
    registry = CollectorRegistry()
    registry.register(_Shown(sources))
    return Exposition(generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4)


def refusals_in(directory: str) -> dict[str, int]:
    """Return how many requests were refused in all processes, by reason."""
    found: dict[str, int] = dict.fromkeys(declared.REFUSALS, 0)
    for counts in read_all(directory)[0]:
        for (reason,), count in counts_of(declared.REFUSED, counts):
            found[reason] += int(count)
    return {reason: count for reason, count in found.items() if count}


class _Shown(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Family]:
        found, damaged = read_all(self._sources.directory)
        if found:
            yield from _counted(add_up(found))
        yield _single(declared.DAMAGED_FILES, damaged)
        yield _gauge(declared.BUILD, {__version__: 1})
        yield from _running(self._sources, time.monotonic_ns())
        yield from _workers(self._sources)
        ready = {name: float(not check()) for name, check in self._sources.checks.items()}
        yield _gauge(declared.READY, ready)


def _counted(counts: "Counts") -> Iterator[Family]:
    for metric in COUNTED:
        shown = _histogram if metric.type is Type.HISTOGRAM else _counter
        family = shown(metric, counts)
        if family.samples:
            yield family


def _counter(metric: Metric, counts: "Counts") -> Family:
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.label_names)
    is_open = any(found is None for _, found in metric.labels)
    for labels, value in counts_of(metric, counts):
        if value or not is_open:  # of those that are not known beforehand, what was counted
            family.add_metric(labels, value)
    return family


def _histogram(metric: Metric, counts: "Counts") -> Family:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.label_names)
    for labels in labels_of(metric):
        numbers = accumulate(counts[place_of(metric, *labels, part=end)] for end in ENDS)
        buckets = [*zip(ENDS, numbers, strict=True)]
        family.add_metric(labels, buckets, counts[place_of(metric, *labels, part=SUM)])
    return family


def _running(sources: Sources, now_ns: int) -> Iterator[Family]:
    rows = [row for row in sources.table.living(*_LIMITED) if row.transfer]
    kinds = {kind.name.lower(): kind for kind in _LIMITED}
    held = {name: sum(row.kind is kind for row in rows) for name, kind in kinds.items()}
    yield _gauge(declared.SLOTS_IN_USE, held)
    limits = {name: sources.limits[kind] for name, kind in kinds.items()}
    yield _gauge(declared.SLOTS_LIMIT, limits)
    most = {
        name: sources.image_limits.get(kinds[name], limits[name])
        for name in declared.LIMITED_PER_IMAGE
    }
    yield _gauge(declared.SLOTS_LIMIT_PER_IMAGE, most)

    def by_operation(metric: Metric, of: Callable[[list[Holder]], float]) -> Family:
        each = {name: [row for row in rows if row.operation == name] for name in declared.RUNNING}
        return _gauge(metric, {name: of(found) for name, found in each.items()})

    yield by_operation(declared.TRANSFERS, len)
    yield by_operation(
        declared.TRANSFER_AGE,
        lambda found: max([0.0, *(row.age(now_ns) for row in found)]),
    )
    yield by_operation(declared.TRANSFER_DONE, lambda found: sum(row.done for row in found))
    yield by_operation(declared.TRANSFER_EXPECTED, lambda found: sum(row.expected for row in found))


def _workers(sources: Sources) -> Iterator[Family]:
    rows = sources.table.living(Kind.WORKER)
    states = [WorkerState.of(row).name.lower() for row in rows]
    yield _gauge(declared.WORKERS, {state: states.count(state) for state in declared.STATES})
    yield _single(declared.THREADS_BUSY, sum(row.done for row in rows))
    accepting = states.count(WorkerState.ACCEPTING.name.lower())
    yield _single(declared.THREADS_LIMIT, sources.threads * accepting)


def _gauge(metric: Metric, values: Mapping[str, float]) -> Family:
    family = GaugeMetricFamily(metric.name, metric.help, labels=metric.label_names)
    for label, value in values.items():
        family.add_metric([label], value)
    return family


def _single(metric: Metric, value: float) -> Family:
    return GaugeMetricFamily(metric.name, metric.help, value)
