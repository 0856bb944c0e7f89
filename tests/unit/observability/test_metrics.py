# SPDX-License-Identifier: Apache-2.0
"""What is counted, how processes' counts are added up, and what is told of what runs now."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from imageserver.core import errors
from imageserver.core.entry import Entry
from imageserver.core.errors import ImageServerError
from imageserver.core.slots import Holder, Kind, Owner
from imageserver.core.workers import WorkerState
from imageserver.observability.metrics import declared, stored
from imageserver.observability.metrics.counted import (
    BACKEND_ERRORS,
    CLIENT_ERRORS,
    NO_IMAGE_SLOT,
    NO_SLOT,
    REFUSALS,
    Metrics,
)
from imageserver.observability.metrics.declared import METRICS, Type
from imageserver.observability.metrics.shown import Sources, exposition

ROOT = Path(__file__).parents[3]
ID = "0c3c9a4e-secret"
ENTRY = Entry("GET", ID, "read", "nbd", None, 512, 206, "", "", 0.02, "192.0.2.1", "r-1")
LIMITS = {Kind.READ: 8, Kind.WRITE: 1, Kind.OTHER: 100}
NS = 1_000_000_000
Sample = tuple[str, tuple[tuple[str, str], ...]]


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[Metrics]:
    made = Metrics(str(tmp_path))
    yield made
    made.close()


class Rows:
    """``ports.Living``: what the tests say."""

    def __init__(self, *rows: Holder) -> None:
        self._rows = rows

    def living(self, *kinds: Kind) -> list[Holder]:
        return [row for row in self._rows if row.kind in kinds]


def sources(directory: Path, *rows: Holder) -> Sources:
    return Sources(str(directory), Rows(*rows), LIMITS, {Kind.READ: 4}, 64, {"config_dir": str})


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "FLUSH_SECONDS", -1)


def shown(directory: Path, *rows: Holder) -> dict[Sample, float]:
    """Return all samples that are not zero."""
    text = exposition(sources(directory, *rows)).text.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.value
    }


def counted(directory: Path) -> dict[str, float]:
    """Return what was counted, as ``name{values}``, without durations and gauges."""
    names = {metric.name for metric in METRICS if metric.type is Type.COUNTER}
    return {
        f"{name}{{{','.join(value for _, value in labels)}}}": number
        for (name, labels), number in shown(directory).items()
        if name in names
    }


# What is counted


def test_a_finished_request_is_counted_by_method_and_status(
    metrics: Metrics, tmp_path: Path
) -> None:
    metrics.finished(ENTRY)
    metrics.finished(ENTRY)
    metrics.finished(ENTRY._replace(method="BREW", status=405))
    metrics.finished(ENTRY._replace(status=0))
    metrics.finished(ENTRY._replace(status=999))

    assert counted(tmp_path) == {
        "imageserver_requests_total{GET,206}": 2,
        "imageserver_requests_total{GET,0}": 2,
        "imageserver_requests_total{other,405}": 1,
    }


def test_its_duration_falls_into_a_bucket_of_its_operation(
    metrics: Metrics, tmp_path: Path
) -> None:
    metrics.finished(ENTRY)
    metrics.finished(ENTRY._replace(seconds=7200.0))
    metrics.finished(ENTRY._replace(operation="brew", seconds=0.0005))

    name = declared.DURATION.name
    found = {
        (labels["operation"], labels["le"]): value
        for (sample, pairs), value in shown(tmp_path).items()
        if sample == f"{name}_bucket"
        for labels in [dict(pairs)]
    }
    ends = [*declared.BUCKETS, math.inf]
    expected = {("other", end): 1.0 for end in ends}
    expected |= {("read", end): 1.0 + (end >= 7200) for end in ends if end >= 0.02}
    assert {(op, float(end)): value for (op, end), value in found.items()} == expected
    assert shown(tmp_path)[f"{name}_sum", (("operation", "read"),)] == 7200.02


def test_what_is_counted_is_written_a_moment_later_or_when_asked_for(
    metrics: Metrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "FLUSH_SECONDS", 60)
    metrics.finished(ENTRY)  # the first one: that long nothing was written
    metrics.finished(ENTRY)
    metrics.accepted()
    metrics.flush_if_due()

    first = {"imageserver_requests_total{GET,206}": 1}
    assert counted(tmp_path) == first
    metrics.flush()
    assert counted(tmp_path) == {
        "imageserver_requests_total{GET,206}": 2,
        "imageserver_connections_total{}": 1,
    }


def test_to_count_makes_no_system_call_but_when_it_is_due(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "FLUSH_SECONDS", 60)
    metrics.flush()
    for name in ("getpid", "fstat", "open", "pwrite"):
        monkeypatch.delattr(stored.os, name)
    metrics.finished(ENTRY._replace(error="NoSlot"))
    metrics.meter("read", "nbd")(1)
    metrics.accepted()
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "operation", "counts"),
    [
        ("ImageBusy", "write", ["refusals_total{image_busy}", "lock_conflicts_total{write}"]),
        ("NoSlot", "read", ["refusals_total{no_read_slot}"]),
        ("NoSlot", "replace", ["refusals_total{no_write_slot}"]),
        ("NoSlot", "flush", ["refusals_total{table_full}"]),
        ("NoImageSlot", "read", ["refusals_total{no_read_slot_of_image}"]),
        ("NoImageSlot", "zero", ["refusals_total{no_write_slot_of_image}"]),
        ("UnknownImage", "get", ["refusals_total{unknown_image}"]),
        ("RangeOutsideImage", "read", ["refusals_total{range_not_satisfiable}"]),
        ("DigestMismatch", "write", ["refusals_total{digest_mismatch}"]),
        ("BackendTimeout", "read", ["backend_errors_total{nbd,timeout}"]),
        ("TurnedAway", "read", ["backend_errors_total{nbd,other}"]),
        ("ClientGone", "extents", ["clients_gone_total{extents}"]),
        ("ShortBody", "put", ["clients_gone_total{other}"]),
    ],
)
def test_what_went_wrong_is_counted_by_its_cause(
    metrics: Metrics, tmp_path: Path, error: str, operation: str, counts: list[str]
) -> None:
    metrics.finished(ENTRY._replace(error=error, operation=operation))

    expected = {"imageserver_requests_total{GET,206}": 1.0}
    assert counted(tmp_path) == expected | {f"imageserver_{name}": 1.0 for name in counts}


def test_every_error_is_of_one_cause() -> None:
    tree = {cls for cls in vars(errors).values() if isinstance(cls, type)}
    leaves = {cls for cls in tree if issubclass(cls, ImageServerError)} - {ImageServerError}
    causes = [*REFUSALS, errors.NoSlot, errors.NoImageSlot, *BACKEND_ERRORS, *CLIENT_ERRORS]

    assert sorted(map(str, causes)) == sorted(map(str, leaves))
    reasons = {*REFUSALS.values(), *NO_SLOT.values(), *NO_IMAGE_SLOT.values()}
    assert reasons <= {*declared.REFUSALS}
    assert {*BACKEND_ERRORS.values()} <= {*declared.BACKEND_ERRORS}


def test_bytes_are_counted_as_they_move_by_direction_and_backend(
    metrics: Metrics, tmp_path: Path
) -> None:
    moves = {
        ("read", "nbd"): 7,
        ("write", "nbd"): 11,
        ("replace", "file"): 13,
        ("replace", "nbd"): 17,
        ("zero", "nbd"): 19,
        ("extents", "nbd"): 23,
        ("flush", "nbd"): 29,
    }
    for (operation, backend), count in moves.items():
        moved = metrics.meter(operation, backend)
        moved(count)
        moved(0)

    assert counted(tmp_path) == {
        "imageserver_image_bytes_total{nbd,read}": 7,
        "imageserver_image_bytes_total{nbd,write}": 28,
        "imageserver_image_bytes_total{file,write}": 13,
        "imageserver_image_bytes_total{nbd,zero}": 19,
    }


def test_what_happens_outside_the_application_is_counted(metrics: Metrics, tmp_path: Path) -> None:
    owner = Owner(1, 1)
    for freed in (None, Holder(Kind.WORKER, owner), Holder(Kind.READ, owner)):
        metrics.freed(freed)
    metrics.refused("bad_head")
    metrics.turned_away("no_descriptor")
    metrics.tls_failed()
    metrics.accepted()

    assert counted(tmp_path) == {
        "imageserver_slots_reclaimed_total{damaged}": 1,
        "imageserver_slots_reclaimed_total{read}": 1,
        "imageserver_worker_deaths_total{}": 1,
        "imageserver_refusals_total{bad_head}": 1,
        "imageserver_connections_refused_total{no_descriptor}": 1,
        "imageserver_tls_handshake_failures_total{}": 1,
        "imageserver_connections_total{}": 1,
    }


def test_a_reason_that_is_not_declared_is_a_bug(metrics: Metrics) -> None:
    with pytest.raises(ValueError, match="not declared"):
        metrics.refused("mood")
    with pytest.raises(ValueError, match="not declared"):
        metrics.turned_away("mood")


# What runs now


def test_gauges_tell_what_the_living_hold(metrics: Metrics, tmp_path: Path) -> None:
    owner, now = Owner(1, 1), time.monotonic_ns()
    rows = [
        Holder(Kind.READ, owner, ID, "read", "", "c", now - 60 * NS, 10, 100),
        Holder(Kind.READ, owner, ID, "read", "", "c", now - 5 * NS, 20, 200),
        Holder(Kind.OTHER, owner, ID, "flush", "", "c", now),
        Holder(Kind.OTHER, owner, "", "check", "", "", now),  # /readyz, at the same moment
        Holder(Kind.WORKER, owner, done=2, expected=WorkerState.ACCEPTING.value),
        Holder(Kind.WORKER, owner, done=1, expected=WorkerState.DRAINING.value),
        Holder(Kind.WORKER, owner, done=0, expected=77),
    ]

    gauges = {metric.name for metric in METRICS if metric.type is Type.GAUGE}
    found = {
        f"{name}{{{','.join(value for _, value in labels)}}}": value
        for (name, labels), value in shown(tmp_path, *rows).items()
        if name in gauges - {declared.BUILD.name}
    }
    age = found.pop("imageserver_transfer_max_age_seconds{read}")
    found.pop("imageserver_transfer_max_age_seconds{flush}")
    assert 60 <= age < 120
    assert found == {
        "imageserver_slots_in_use{read}": 2,
        "imageserver_slots_in_use{other}": 1,
        "imageserver_slots_limit{read}": 8,
        "imageserver_slots_limit{write}": 1,
        "imageserver_slots_limit{other}": 100,
        "imageserver_slots_limit_per_image{read}": 4,
        "imageserver_slots_limit_per_image{write}": 1,
        "imageserver_transfers{read}": 2,
        "imageserver_transfers{flush}": 1,
        "imageserver_transfer_done_bytes{read}": 30,
        "imageserver_transfer_expected_bytes{read}": 300,
        "imageserver_workers{accepting}": 1,
        "imageserver_workers{draining}": 1,
        "imageserver_threads_busy{}": 3,
        "imageserver_threads_limit{}": 64,
        "imageserver_ready{config_dir}": 1,
    }


# What is declared


def test_all_that_is_shown_is_declared_and_all_that_is_declared_is_shown(
    metrics: Metrics, tmp_path: Path
) -> None:
    metrics.finished(ENTRY)
    text = exposition(sources(tmp_path)).text.decode()
    families = {
        family.name + "_total" * (family.type == "counter"): family
        for family in text_string_to_metric_families(text)
    }

    told = {name: (family.type, family.documentation) for name, family in families.items()}
    assert told == {metric.name: (metric.type.value, metric.help) for metric in METRICS}
    for metric in METRICS:
        allowed = dict(metric.labels)
        for sample in families[metric.name].samples:
            labels = {name: text for name, text in sample.labels.items() if name != "le"}
            assert labels.keys() == allowed.keys()
            for name, value in labels.items():
                values_of = allowed[name]
                assert values_of is None or value in values_of


def test_names_are_as_prometheus_wants_them() -> None:
    for metric in METRICS:
        assert metric.name.startswith("imageserver_")
        assert metric.name.endswith("_total") == (metric.type is Type.COUNTER)
        assert metric.help.endswith(".")
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_no_metric_tells_an_id_a_client_or_a_request(metrics: Metrics, tmp_path: Path) -> None:
    metrics.finished(ENTRY._replace(error="BackendError", detail="/run/vm.sock"))
    row = Holder(Kind.READ, Owner(1, 1), ID, "read", "i-key", "192.0.2.1", time.time_ns())

    text = exposition(sources(tmp_path, row)).text.decode()
    assert [word for word in (ID, "192.0.2.1", "r-1", "vm.sock", "i-key") if word in text] == []
