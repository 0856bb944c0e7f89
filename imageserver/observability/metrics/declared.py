# SPDX-License-Identifier: Apache-2.0
"""Every metric, declared once: its name, its kind, its labels and their values, one line of help.

docs/metrics.md is made of this, and what is not declared here cannot be counted. Labels have few
values, all known beforehand but for HTTP's statuses: never an id, a client or a path.
"""

from dataclasses import dataclass
from enum import Enum

from imageserver.backends.table import TABLE
from imageserver.core.slots import Kind
from imageserver.core.workers import WorkerState


class Type(Enum):
    """What Prometheus calls a metric's type."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``labels``: their values by name; None stands for any status."""

    name: str
    type: Type
    help: str
    labels: tuple[tuple[str, tuple[str, ...] | None], ...] = ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return tuple(name for name, _ in self.labels)


OTHER = "other"
METHODS = ("GET", "HEAD", "PUT", "PATCH", "POST", "OPTIONS", OTHER)
#: HTTP's, and 0: the client had gone before there was one.
STATUSES = ("0", *map(str, range(100, 600)))
#: What sessions are asked for; probes; and requests that ended before it was clear.
RUNNING = ("read", "write", "replace", "zero", "flush", "extents", "checksum", "qcow2")
OPERATIONS = (*RUNNING, "options", "head", OTHER)
BACKENDS = tuple(kind.name for kind in TABLE)
DIRECTIONS = ("read", "write", "zero")
BACKEND_ERRORS = ("error", "timeout", "access", "no_space", OTHER)
REFUSALS = (
    "image_busy",
    "no_read_slot",
    "no_write_slot",
    "no_read_slot_of_image",
    "no_write_slot_of_image",
    "table_full",
    "server_busy",
    "state_unavailable",
    "bad_head",
    "head_timeout",
    "bad_request",
    "not_found",
    "unknown_image",
    "unauthorized",
    "method_not_allowed",
    "range_not_satisfiable",
    "digest_mismatch",
    "precondition_failed",
)
CONNECTION_REFUSALS = ("too_many", "no_descriptor", "not_admitted")
SLOTS = tuple(kind.name.lower() for kind in (Kind.READ, Kind.WRITE, Kind.OTHER))
LIMITED_PER_IMAGE = tuple(kind.name.lower() for kind in (Kind.READ, Kind.WRITE))
STATES = tuple(state.name.lower() for state in WorkerState if state is not WorkerState.UNKNOWN)
CHECKS = ("config_dir", "runtime_dir", "slot_table")

#: Upper ends of a duration's buckets, in seconds: from a probe to the copy of a large disk.
BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0),
)

_OPERATION = (("operation", OPERATIONS),)
_RUNNING = (("operation", RUNNING),)

REQUESTS = Metric(
    "imageserver_requests_total",
    Type.COUNTER,
    "Requests for images that have ended; status 0: the client had gone before there was one.",
    (("method", METHODS), ("status", None)),
)
DURATION = Metric(
    "imageserver_request_duration_seconds",
    Type.HISTOGRAM,
    "Time from a request's head to the end of its answer.",
    _OPERATION,
)
BYTES = Metric(
    "imageserver_image_bytes_total",
    Type.COUNTER,
    "Bytes of images read, written and zeroed, counted while a transfer runs.",
    (("direction", DIRECTIONS), ("backend", BACKENDS)),
)
REFUSED = Metric(
    "imageserver_refusals_total",
    Type.COUNTER,
    "Requests that were refused, with those that never became one (bad_head, head_timeout).",
    (("reason", REFUSALS),),
)
CONFLICTS = Metric(
    "imageserver_lock_conflicts_total",
    Type.COUNTER,
    "Requests refused because another operation held the image's lock.",
    _RUNNING,
)
BACKEND_FAILURES = Metric(
    "imageserver_backend_errors_total",
    Type.COUNTER,
    "Requests that failed for their image: NBD errors and timeouts, files, full disks.",
    (("backend", BACKENDS), ("kind", BACKEND_ERRORS)),
)
CLIENTS_GONE = Metric(
    "imageserver_clients_gone_total",
    Type.COUNTER,
    "Requests whose client broke off, fell silent or sent less than it had announced.",
    _OPERATION,
)
RECLAIMED = Metric(
    "imageserver_slots_reclaimed_total",
    Type.COUNTER,
    "Slots freed because the process that held them had died, or their record was damaged.",
    (("kind", (*SLOTS, "damaged")),),
)
WORKER_DEATHS = Metric(
    "imageserver_worker_deaths_total",
    Type.COUNTER,
    "Workers that died without an orderly end.",
)
CONNECTIONS = Metric(
    "imageserver_connections_total",
    Type.COUNTER,
    "Connections accepted from clients of images.",
)
CONNECTIONS_REFUSED = Metric(
    "imageserver_connections_refused_total",
    Type.COUNTER,
    "Connections closed or left waiting for want of room, or because nobody may come in there.",
    (("reason", CONNECTION_REFUSALS),),
)
TLS_FAILURES = Metric(
    "imageserver_tls_handshake_failures_total",
    Type.COUNTER,
    "TLS handshakes that failed or took too long.",
)

SLOTS_IN_USE = Metric(
    "imageserver_slots_in_use",
    Type.GAUGE,
    "Slots held now, over all workers.",
    (("kind", SLOTS),),
)
SLOTS_LIMIT = Metric(
    "imageserver_slots_limit",
    Type.GAUGE,
    "Slots that there are, over all workers.",
    (("kind", SLOTS),),
)
SLOTS_LIMIT_PER_IMAGE = Metric(
    "imageserver_slots_limit_per_image",
    Type.GAUGE,
    "Slots that one image can have, over all workers: all, where there is no limit per image.",
    (("kind", LIMITED_PER_IMAGE),),
)
TRANSFERS = Metric(
    "imageserver_transfers",
    Type.GAUGE,
    "Operations on images that run now.",
    _RUNNING,
)
TRANSFER_AGE = Metric(
    "imageserver_transfer_max_age_seconds",
    Type.GAUGE,
    "Time since the oldest running operation began; 0 where none runs.",
    _RUNNING,
)
TRANSFER_DONE = Metric(
    "imageserver_transfer_done_bytes",
    Type.GAUGE,
    "Bytes that the running operations have done.",
    _RUNNING,
)
TRANSFER_EXPECTED = Metric(
    "imageserver_transfer_expected_bytes",
    Type.GAUGE,
    "Bytes that the running operations are about.",
    _RUNNING,
)
WORKERS = Metric(
    "imageserver_workers",
    Type.GAUGE,
    "Worker processes that live.",
    (("state", STATES),),
)
THREADS_BUSY = Metric(
    "imageserver_threads_busy",
    Type.GAUGE,
    "Threads with a request other than a probe, over all workers.",
)
THREADS_LIMIT = Metric(
    "imageserver_threads_limit",
    Type.GAUGE,
    "Threads for requests other than probes, over all workers that accept.",
)
READY = Metric(
    "imageserver_ready",
    Type.GAUGE,
    "1 where a check of /readyz passes, 0 where it fails.",
    (("check", CHECKS),),
)
DAMAGED_FILES = Metric(
    "imageserver_metrics_damaged_files",
    Type.GAUGE,
    "Files of counters that cannot be read and are left out.",
)
BUILD = Metric(
    "imageserver_build_info",
    Type.GAUGE,
    "1; the label says which version answers.",
    (("version", None),),
)

METRICS = tuple(value for value in list(vars().values()) if isinstance(value, Metric))
