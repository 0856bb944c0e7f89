# SPDX-License-Identifier: Apache-2.0
"""What /metrics shows: the counts of all processes added up, and gauges of what runs now.

Gauges are never stored. They are read from the slot table when they are asked for, as rows of
processes that live, so that nothing remains of one that has died.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from imageserver import __version__
from imageserver.core.ports import Exposition, Living
from imageserver.core.slots import Holder, Kind, WorkerState
from imageserver.observability.metrics import declared
from imageserver.observability.metrics.declared import Metric
from imageserver.observability.metrics.numbers import files, is_sound

_LIMITED = (Kind.READ, Kind.WRITE, Kind.OTHER)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where metrics come from."""

    directory: str
    """Of the files of counts."""
    table: Living
    limits: Mapping[Kind, int]
    threads: int
    """Of each worker."""
    checks: Mapping[str, Callable[[], str]]


def exposition(sources: Sources) -> Exposition:
    """Return everything as text."""
    registry = CollectorRegistry()
    registry.register(_Shown(sources))
    return Exposition(generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4)


class _Shown(Collector):
    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Family]:
        found = files(self._sources.directory)
        sound = [path for path in found if is_sound(path)]
        yield from MultiProcessCollector.merge(sound)  # type: ignore[no-untyped-call]
        yield _single(declared.DAMAGED_FILES, len(found) - len(sound))
        yield _gauge(declared.BUILD, {__version__: 1})
        yield from _running(self._sources, time.monotonic_ns())
        yield from _workers(self._sources)
        ready = {name: float(not check()) for name, check in self._sources.checks.items()}
        yield _gauge(declared.READY, ready)


def _running(sources: Sources, now_ns: int) -> Iterator[Family]:
    rows = [row for row in sources.table.living(*_LIMITED) if row.transfer]
    kinds = {kind.name.lower(): kind for kind in _LIMITED}
    held = {name: sum(row.kind is kind for row in rows) for name, kind in kinds.items()}
    yield _gauge(declared.SLOTS_IN_USE, held)
    limits = {name: sources.limits[kind] for name, kind in kinds.items()}
    yield _gauge(declared.SLOTS_LIMIT, limits)

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
