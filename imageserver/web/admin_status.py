# SPDX-License-Identifier: Apache-2.0
"""What ``/status`` says (docs/api.md): what runs, what has ended lately, slots, refusals, workers.

Made of what all workers keep in common; nothing is asked of an image or of another process.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from imageserver.core.recent import CELLS, MOST_ROWS, Ended, Recently, Touched, runs
from imageserver.core.reports import Living
from imageserver.core.slots import Holder, Kind
from imageserver.core.transfer import id_hash
from imageserver.core.workers import WorkerState
from imageserver.images.mapping import Picture

RUNNING = (Kind.READ, Kind.WRITE, Kind.OTHER)
_LIMITED = (Kind.READ, Kind.WRITE)
#: Digits of an id's hash: a thousand transfers collide once in half a million times.
_HASH_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Books:
    """Where the answer comes from."""

    table: Living
    limits: Mapping[str, int | None]
    """On how much may run at once, by the settings' names; None: there is none."""
    recently: Callable[[], Recently]
    refusals: Callable[[], Mapping[str, int]]
    """How many requests were refused, by reason."""
    touched: Callable[[], Mapping[str, Touched]]
    """What was touched of images, by the transfer's id."""


def status(books: Books, *, full_ids: bool, opened: str | None = None) -> dict[str, object]:
    """Return the answer; ``opened``: with what is known of this transfer, by its id or hash."""
    now_ns = time.monotonic_ns()
    named = str if full_ids else hashed
    rows = [row for row in books.table.living(*RUNNING, Kind.WORKER) if row.started_ns]
    running = [row for row in rows if row.kind is not Kind.WORKER and row.transfer]
    running.sort(key=lambda row: row.started_ns)
    workers = sorted(
        (row for row in rows if row.kind is Kind.WORKER), key=lambda row: row.owner.pid
    )
    lately = books.recently()
    told: dict[str, object] = {
        "transfers": [transfer(row, now_ns, named) for row in running],
        "workers": [_worker(row) for row in workers],
        "limits": dict(books.limits),
        "slots": _slots(running, books.limits),
        "images": _images(running, books.limits, named),
        "finished": [ended(row, now_ns, named) for row in lately.finished[:MOST_ROWS]],
        "failed": [ended(row, now_ns, named) for row in lately.failed[:MOST_ROWS]],
        "refusals": dict(books.refusals()),
    }
    if opened is not None:
        touched = books.touched()
        found = find(opened, _ids(running, lately, touched))
        told["transfer"] = found and _opened(found, lately, touched.get(found), now_ns, named)
    return told


def known_ids(books: Books) -> set[str]:
    """Return the ids of the transfers that operators can have seen."""
    return _ids(books.table.living(*RUNNING), books.recently(), books.touched())


def _ids(running: Iterable[Holder], lately: Recently, touched: Mapping[str, Touched]) -> set[str]:
    ended_ids = {row.transfer for row in (*lately.finished, *lately.failed)}
    return {row.transfer for row in running if row.transfer} | ended_ids | touched.keys()


def find(name: str, known: Iterable[str]) -> str | None:
    """Return the id that an operator means, who has it or what stands for it."""
    return next((each for each in known if name in {each, hashed(each)}), None)


def _opened(
    transfer_id: str,
    lately: Recently,
    touched: Touched | None,
    now_ns: int,
    named: Callable[[str], str],
) -> dict[str, object]:
    """Tell what is known of one transfer beside what it runs."""
    finished, failed = (
        [ended(row, now_ns, named) for row in rows if row.transfer == transfer_id]
        for rows in (lately.finished, lately.failed)
    )
    told: dict[str, object] = {"id": named(transfer_id), "finished": finished, "failed": failed}
    if touched is None:
        return told | {"touched": None}
    cells = {"read": [*runs(touched.read)], "written": [*runs(touched.written)]}
    return told | {"touched": {"size": touched.size, "cells": CELLS} | cells}


def hashed(transfer_id: str) -> str:
    """Return what stands for an id where it must not be told."""
    return id_hash(transfer_id)[:_HASH_DIGITS]


def transfer(row: Holder, now_ns: int, named: Callable[[str], str]) -> dict[str, object]:
    """Tell of an operation that runs."""
    age = row.age(now_ns)
    return {
        "id": named(row.transfer),
        "operation": row.operation,
        "client": row.client,
        "worker": row.owner.pid,
        "done": row.done,
        "expected": row.expected,
        "rate": round(row.done / age) if age else 0,
        "age": round(age, 3),
        "key": f"{row.owner.pid}-{row.started_ns}",
    }


def ended(row: Ended, now_ns: int, named: Callable[[str], str]) -> dict[str, object]:
    """Tell of operations that have ended alike."""
    told: dict[str, object] = {
        "id": named(row.transfer),
        "operation": row.operation,
        "client": row.client,
        "worker": row.worker,
        "status": row.status,
        "count": row.count,
        "done": row.done,
        "seconds": round(row.seconds, 3),
        "ago": round(max(0, now_ns - row.at_ns) / 1e9, 1),
    }
    return told | {"error": row.error} if row.error else told


def drawn(picture: Picture) -> dict[str, object]:
    """Tell an image's map: of each cell a digit for what is shown, and one for how much of it."""
    canvas = picture.canvas
    cells = [*canvas.cells()]
    return {
        "size": canvas.size,
        "extents": canvas.extents,
        "flag": picture.flag,
        "kinds": "".join(str(int(cell.shown)) for cell in cells),
        "levels": "".join(str(cell.level) for cell in cells),
        "totals": canvas.totals(),
    }


def _slots(running: Sequence[Holder], limits: Mapping[str, int | None]) -> dict[str, object]:
    return {
        kind.name.lower(): {
            "in_use": sum(row.kind is kind for row in running),
            "limit": limits[_limit(kind)],
            "limit_per_image": limits[f"{_limit(kind)}_per_image"],
        }
        for kind in _LIMITED
    }


def _limit(kind: Kind) -> str:
    return {Kind.READ: "max_readers", Kind.WRITE: "max_writers"}[kind]


def _images(
    running: Iterable[Holder], limits: Mapping[str, int | None], named: Callable[[str], str]
) -> list[dict[str, object]]:
    """Tell of each image how many slots it has, where images have limits of their own.

    An image is known by the ids of those who have it: its path is nobody's business.
    """
    kinds = {kind for kind in _LIMITED if limits[f"{_limit(kind)}_per_image"] is not None}
    found: dict[str, list[Holder]] = {}
    for row in running:
        if row.kind in kinds and row.image:
            found.setdefault(row.image, []).append(row)
    return [
        {"ids": list(dict.fromkeys(named(row.transfer) for row in rows))}
        | {kind.name.lower(): sum(row.kind is kind for row in rows) for kind in _LIMITED}
        for rows in found.values()
    ]


def _worker(row: Holder) -> dict[str, object]:
    return {
        "worker": row.owner.pid,
        "state": WorkerState.of(row).name.lower(),
        "busy": row.done,
    }
