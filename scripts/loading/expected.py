# SPDX-License-Identifier: Apache-2.0
"""The requests that ``scripts/load`` must have made: a kind it has not made, it has not tested."""

from collections.abc import Iterable, Mapping
from typing import Any

from loading.report import too_few

#: By user; a server of our own has images of every kind, so every kind of request is made.
REQUESTS: dict[str, tuple[str, ...]] = {
    "backup": ("GET", "GET extents dirty", "GET extents zero", "GET range"),
    "control": (
        "GET changed",
        "GET extents new",
        "GET new",
        "GET unknown",
        "GET while ended",
        "OPTIONS new",
        "OPTIONS unknown",
        "end file",
        "end socket",
        "make file",
        "make socket",
    ),
    "probe": ("HEAD", "OPTIONS", "OPTIONS /images/*"),
    "restore": ("GET back", "PATCH range", "PATCH zero", "POST flush", "PUT"),
}


def missing(figures: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what was done too rarely, by the figures of locust's ``--json-file``."""
    done = {f"{user}: {name}": 0 for user, names in REQUESTS.items() for name in names}
    for entry in figures:
        key = f"{entry['method']}: {entry['name']}"
        if key in done:
            done[key] = entry["num_requests"] - entry["num_failures"]
    return too_few(done)
