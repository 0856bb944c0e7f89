# SPDX-License-Identifier: Apache-2.0
"""The table of a run: locust's statistics, by user and request; and what it must have done."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loading.client import REFUSED

_MIB = 1 << 20
#: Requests of a kind that must have been done for a run to have shown anything of that kind.
LEAST_DONE = 3
#: What ``scripts/load`` must have made, by user: its server has images of every kind.
REQUESTS: dict[str, tuple[str, ...]] = {
    "backup": ("GET", "GET extents dirty", "GET extents zero", "GET range"),
    "control": (
        *("GET changed", "GET extents new", "GET new", "GET unknown", "GET while ended"),
        *("OPTIONS new", "OPTIONS unknown", "end file", "end socket", "make file", "make socket"),
    ),
    "probe": ("HEAD", "OPTIONS", "OPTIONS /images/*"),
    "restore": ("GET back", "PATCH range", "PATCH zero", "POST flush", "PUT"),
}
_LINE = "{:7}  {:18}  {:>6}  {:>7}  {:>6}  {:>6}  {:>4}  {:>6}  {:>6}"
_HEAD = ("user", "request", "done", "refused", "failed", "median", "p95", "p99 ms", "MiB/s")


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of request of one kind of user."""

    user: str
    name: str
    done: int
    refused: int
    failed: int
    milliseconds: tuple[float, ...]
    rate: float
    """MiB/s moved, in either direction."""


def rows(stats: Any, seconds: float) -> list[Row]:  # noqa: ANN401 - locust's statistics
    """Return what happened; ``seconds``: how long the run took."""
    entries = {(entry.method, entry.name): entry for entry in stats.entries.values()}
    plain = {(user, name.removesuffix(REFUSED)) for user, name in entries}
    found = []
    for user, name in sorted(plain):
        entry = entries.get((user, name))
        refused = entries.get((user, name + REFUSED))
        count, failed = (entry.num_requests, entry.num_failures) if entry else (0, 0)
        times = [
            entry.get_response_time_percentile(p) or 0 if entry else 0 for p in (0.5, 0.95, 0.99)
        ]
        rate = entry.total_content_length / _MIB / max(seconds, 0.001) if entry else 0.0
        due = refused.num_requests if refused else 0
        found.append(Row(user, name, count - failed, due, failed, tuple(times), rate))
    return found


def table(found: Collection[Row]) -> str:
    """Return the rows and their sum, aligned."""
    lines: list[tuple[object, ...]] = [_HEAD]
    for row in found:
        times = (f"{value:.0f}" for value in row.milliseconds)
        lines.append(
            (row.user, row.name, row.done, row.refused, row.failed, *times, f"{row.rate:.1f}")
        )
    counts = (sum(getattr(row, name) for row in found) for name in ("done", "refused", "failed"))
    lines.append(("all", "", *counts, "", "", "", f"{sum(row.rate for row in found):.1f}"))
    return "\n".join(_LINE.format(*line) for line in lines)


def failures(stats: Any, exceptions: Any) -> list[str]:  # noqa: ANN401 - locust's
    """Return what must not have happened, most frequent first."""
    errors = sorted(stats.errors.values(), key=lambda error: -error.occurrences)
    lines = [
        f"{error.occurrences} x {error.method} {error.name}: {error.error}" for error in errors
    ]
    lines += [f"{found['count']} x {found['msg']}\n{found['traceback']}" for found in exceptions]
    return lines


def idle(found: Iterable[Row], users: Collection[str]) -> list[str]:
    """Return which of the kinds of users that a run should have had got too little done."""
    done = dict.fromkeys(users, 0)
    for row in found:
        done[row.user] = done.get(row.user, 0) + row.done
    if not done:
        return ["no user was started"]
    return too_few(done)


def too_few(done: Mapping[str, int]) -> list[str]:
    """Return, by name, what was done less often than shows anything."""
    return [
        f"{name}: {count} done, at least {LEAST_DONE} are needed"
        for name, count in sorted(done.items())
        if count < LEAST_DONE
    ]


def missing(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the requests made too rarely, by locust's ``--json-file``: they were not tested."""
    done = {f"{user}: {name}": 0 for user, names in REQUESTS.items() for name in names}
    for entry in figures:
        key = f"{entry['method']}: {entry['name']}"
        if key in done:
            done[key] = entry["num_requests"] - entry["num_failures"]
    return too_few(done)
