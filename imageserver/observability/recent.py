# SPDX-License-Identifier: Apache-2.0
"""What this process has done lately, for operators: kept in memory, written for all processes.

    metrics/recent_N.json     the rows of operations that have ended (``core/recent.py``)
    metrics/touched_N.json    which cells of images were read and written

Beside the counts of the process, under the same number (``metrics/numbers.py``), so that a
successor goes on with the rows of one that has died. To note a request costs no system call; the
worker's loop writes once a second what is new. A file is replaced whole: no reader sees a half.

What cannot be written is left out: it is for operators to look at, and nothing depends on it.
"""

import contextlib
import json
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

from imageserver.core.entry import Entry
from imageserver.core.ranges import Span
from imageserver.core.recent import CELLS, MOST_ROWS, Ended, Recently, Touched, recently
from imageserver.observability.metrics.declared import METHODS, OPERATIONS, OTHER, RUNNING
from imageserver.runtime.private import open_private, read_regular

if TYPE_CHECKING:
    from imageserver.core.reports import Underway

#: How long what is new may be missing from the files.
FLUSH_SECONDS = 1.0
#: Transfers of which a process knows what was touched; those touched last.
MOST_TOUCHED = 256
#: Requests that may have ended until the rows are made up at once.
_MOST_NEW = 4096
#: Longest file that is read, in bytes: several times what this module writes.
_MOST_BYTES = 1 << 20
_READ, _WRITTEN = 0, 1
_SIDES = {"read": _READ, "checksum": _READ} | dict.fromkeys(("write", "replace", "zero"), _WRITTEN)
_OPERATIONS = frozenset(RUNNING)
_KNOWN = frozenset((*OPERATIONS, *map(str.lower, METHODS)))
_ONES = bytes((1,)) * CELLS
_DIGITS = bytes.maketrans(b"\0\1", b"01")

_Key = tuple[str, str, str, int, str]


class _Rows(OrderedDict[_Key, list[Any]]):
    """Rows of like operations: each a list of count, bytes, seconds, and when the last ended."""

    def row(self, key: _Key) -> list[Any]:
        """Return the row that is the latest from now on."""
        row = self.get(key)
        if row is None:
            row = self[key] = [0, 0, 0.0, 0]
            if len(self) > MOST_ROWS:
                self.popitem(last=False)
        else:
            self.move_to_end(key)
        return row


class _Trace:
    """What of an image was touched: a byte for each cell."""

    __slots__ = ("sides", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.sides = bytearray(CELLS), bytearray(CELLS)


class Recent:
    """What one process has done: ``ports.Journal``. Every method may be called from any thread."""

    def __init__(
        self, path_of: Callable[[str], str], now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """``path_of`` returns the path of this process's file of a name, "" where it has none."""
        #: The requests that have begun to use their images and have not ended.
        self.underway: set[Underway] = set()
        self._path_of = path_of
        self._now_ns = now_ns
        self._lock = Lock()
        #: What has ended since the rows were last made up.
        self._new: deque[Entry] = deque()
        self._finished, self._failed = _Rows(), _Rows()
        self._traces: OrderedDict[str, _Trace] = OrderedDict()
        self._has_rows = self._has_traces = False
        self._due_ns = 0
        self._took_over = ""

    def finished(self, entry: Entry) -> None:
        """Note a request of a known transfer that was more than a probe, or has failed."""
        if entry.backend and (entry.error or entry.operation in _OPERATIONS):
            if entry.operation not in _KNOWN:  # a method that a client has made up
                entry = entry._replace(operation=OTHER)
            self._new.append(entry)
            if len(self._new) > _MOST_NEW:
                with self._lock:
                    self._make_up()

    def _make_up(self) -> None:
        """Add what is new to the rows; under the lock.

        All at once, for so a small request costs a third of what it would by itself.
        """
        new, at_ns = self._new, self._now_ns()
        known: dict[_Key, list[Any]] = {}
        self._has_rows |= bool(new)
        while new:
            _, transfer, operation, _, span, done, status, error, _, seconds, client, _ = (
                new.popleft()
            )
            key = transfer, operation, client, status, error
            row = known.get(key)
            if row is None:
                row = known[key] = (self._failed if error else self._finished).row(key)
                if transfer in self._traces:
                    self._traces.move_to_end(transfer)
            row[0] += 1
            row[1] += done
            row[2] += seconds
            row[3] = at_ns
            if span is not None:
                self._touch(transfer, operation, span, done)

    def _touch(self, transfer: str, operation: str, span: Span, done: int) -> None:
        """Mark the first ``done`` bytes of a span; under the lock."""
        side = _SIDES.get(operation)
        start, size = span.start, span.size
        if side is None or done <= 0 or start + done > size:
            return
        trace = self._traces.get(transfer)
        if trace is None or trace.size != size:
            trace = self._traces[transfer] = _Trace(size)
            self._traces.move_to_end(transfer)
            if len(self._traces) > MOST_TOUCHED:
                self._traces.popitem(last=False)
        cells = trace.sides[side]
        first, last = start * CELLS // size, (start + done - 1) * CELLS // size
        if first == last:
            if not cells[first]:
                cells[first] = 1
                self._has_traces = True
        elif cells[first : last + 1] != (ones := _ONES[: last + 1 - first]):
            cells[first : last + 1] = ones
            self._has_traces = True

    # Files

    def flush_if_due(self) -> None:
        """Write what is new, where that was last done ``FLUSH_SECONDS`` ago or longer."""
        if self._now_ns() >= self._due_ns:
            self.flush()

    def flush(self) -> None:
        """Write what is new; of requests under way, what they have touched so far."""
        self._due_ns = self._now_ns() + int(FLUSH_SECONDS * 1e9)
        path = self._path_of("recent")
        if not path:
            return
        if path != self._took_over:
            self._took_over = path
            self._take_over(path)
        with self._lock:
            self._make_up()
            for request in list(self.underway):
                if request.span is not None:
                    told = request.transfer_id, request.operation, request.span
                    self._touch(*told, request.done)
            rows = self._rows() if self._has_rows else None
            traces = self._shown() if self._has_traces else None
            self._has_rows = self._has_traces = False
        if rows is not None:
            _write(path, rows)
        if traces is not None:
            _write(self._path_of("touched"), traces)

    def _rows(self) -> list[list[object]]:
        worker = os.getpid()
        kept = (*self._finished.items(), *self._failed.items())
        return [[*key, worker, *row] for key, row in kept]

    def _shown(self) -> list[list[object]]:
        return [
            [
                transfer,
                trace.size,
                *(f"{int(side.translate(_DIGITS)[::-1], 2):x}" for side in sides),
            ]
            for transfer, trace in self._traces.items()
            for sides in (trace.sides,)
        ]

    def _take_over(self, path: str) -> None:
        """Go on with the rows that the last process of this number has left."""
        for left in _rows_in(path):
            key = left.transfer, left.operation, left.client, left.status, left.error
            rows = self._failed if left.error else self._finished
            with self._lock:
                rows.row(key)[:] = left.count, left.done, left.seconds, left.at_ns
                self._has_rows = True


def ended_in(directory: str) -> Recently:
    """Return what has ended lately in all processes that count in this directory."""
    return recently(row for path in _files(directory, "recent_") for row in _rows_in(path))


def touched_in(directory: str) -> Iterator[Touched]:
    """Yield what each process has touched."""
    for path in _files(directory, "touched_"):
        # Another program may have written over it.
        with contextlib.suppress(IndexError, TypeError, ValueError):
            for transfer, size, read, written in _read(path):
                yield Touched(str(transfer), int(size), int(read, 16), int(written, 16))


def _rows_in(path: str) -> Iterator[Ended]:
    with contextlib.suppress(IndexError, TypeError, ValueError):
        for row in _read(path):
            text = (str(row[0]), str(row[1]), str(row[2]), int(row[3]), str(row[4]))
            numbers = (int(row[5]), int(row[6]), int(row[7]), float(row[8]), int(row[9]))
            yield Ended(*text, *numbers)


def _files(directory: str, prefix: str) -> Iterable[str]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [
        os.path.join(directory, name)
        for name in names
        if name.startswith(prefix) and name.endswith(".json")
    ]


def _read(path: str) -> list[list[Any]]:
    """Return the rows of a file; none where it is gone or damaged."""
    try:
        found = json.loads(read_regular(path, _MOST_BYTES) or b"[]")
    except (OSError, ValueError):
        return []
    if not isinstance(found, list):
        return []
    return [row for row in found if isinstance(row, list)]


def _write(path: str, rows: list[list[object]]) -> None:
    data = json.dumps(rows, separators=(",", ":")).encode()
    directory, name = os.path.split(path)
    with contextlib.suppress(OSError):
        fd = open_private(directory, f"{name}.new")
        try:
            os.ftruncate(fd, 0)
            written = os.write(fd, data)
        finally:
            os.close(fd)
        if written == len(data):
            os.rename(f"{path}.new", path)
