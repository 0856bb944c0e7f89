# SPDX-License-Identifier: Apache-2.0
"""What ``imagectl top`` draws of a status: a head, the workers, one row for each running transfer.

    HOST:PORT  1 transfer  2 MiB/s
    workers: 2 ready; busy threads: 1 (11:1 12:0)

    slots: read 1 of 8, write 0 of 1; refused: 2 image_busy

    id           operation client    worker  done                 rate     age
    4e0d9a2c     read      10.0.0.1      11  █████▎      44 %  2 MiB/s    10 s

    failed lately
    8c1f0b7e     write     10.0.0.2  BackendTimeout (504), 1 time, 12 s ago

Columns that do not fit are left out, the least useful first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from imageserver.client.showing.status import Ended, Lately, Running, Status, Worker
from imageserver.client.showing.units import rate_text, size_text, time_text

#: Columns of a terminal from which there is room for more columns.
_WIDE = 110
#: Most of an id that is shown: over TCP ids have as much.
_ID_WIDTH = 12
#: Columns of a bar: as many as are left, but not fewer than tell something.
_BAR, _WIDE_BAR, _LEAST_BAR = 12, 24, 4
#: Rows of what has ended, of each outcome: a terminal has little room.
_MOST_ENDED = 3


class TopTable:
    """Draws one status of the server called ``name``."""

    def __init__(self, name: str, *, plain: bool) -> None:
        self.console = Console(highlight=False)
        self._name = name
        self._plain = plain

    def drawn(self, status: Status, problem: str) -> RenderableType:
        """Return what is printed; ``problem``: why there is no status, or empty."""
        count = len(status.transfers)
        head = Text.assemble(
            (self._name, "bold"),
            f"  {count} transfer{'s' * (count != 1)}  ",
            (rate_text(status.rate), "bold green"),
        )
        if problem:
            return Group(head, Text(problem, "bold red"))
        lines: list[RenderableType] = [head, Text(workers_line(status.workers), "bright_black")]
        lately = status.lately
        if lately.slots:
            lines.append(Text(slots_line(lately), "bright_black"))
        lines += [Text(f"not ready: {problem}", "bold red") for problem in lately.problems]
        if status.transfers:
            lines += [Text(), self._table(status)]
        for name, rows, style in (
            ("failed lately", lately.failed, "red"),
            ("finished lately", lately.finished, "bright_black"),
        ):
            if rows:
                lines += [Text(), Text(name, "bold"), _ended_table(rows[:_MOST_ENDED], style)]
        return Group(*lines)

    def _table(self, status: Status) -> Table:
        """Return the columns that fit; the bar gets what is left, if that is enough for one."""
        wide = self.console.width >= _WIDE
        rows = [_texts(transfer, wide=wide) for transfer in status.transfers]
        columns = _fitting(_WIDE_COLUMNS if wide else _COLUMNS, rows, self.console.width)
        left = self.console.width - sum(width + 1 for _, width in columns)
        bar_width = min(_WIDE_BAR if wide else _BAR, left)
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
        bar_column = "done" if bar_width >= _LEAST_BAR else None
        for column, width in columns:
            if has_bar := column.name == bar_column:
                table.add_column("done", no_wrap=True, min_width=bar_width)
            table.add_column(
                "" if has_bar else column.name,
                justify="left" if column.name in _LEFT else "right",
                no_wrap=True,
                min_width=width,
            )
        for transfer, texts in zip(status.transfers, rows, strict=True):
            cells = []
            for column, _width in columns:
                if column.name == bar_column:
                    cells.append(Text(bar(transfer.share, bar_width, plain=self._plain), "blue"))
                cells.append(Text(texts[column.name], column.style))
            table.add_row(*cells)
        return table


def _ended_table(rows: Sequence[Ended], style: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    for name in ("id", "operation", "client", "outcome"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for row in rows:
        times = f"{row.count} time{'s' * (row.count != 1)}"
        moved = row.error or size_text(row.done)
        outcome = f"{moved} ({row.status}), {times}, {time_text(row.ago)} ago"
        table.add_row(
            *(row.id[:_ID_WIDTH], Text(row.operation, "cyan"), row.client, Text(outcome, style))
        )
    return table


def slots_line(lately: Lately) -> str:
    """Return one line about slots in use against their limits, and refusals by reason."""
    slots = ", ".join(
        f"{kind} {slot.in_use} of {slot.limit}"
        + (f" ({slot.limit_per_image} an image)" if slot.limit_per_image else "")
        for kind, slot in lately.slots.items()
    )
    refused = ", ".join(f"{count} {reason}" for reason, count in lately.refusals.items())
    return f"slots: {slots}" + (f"; refused: {refused}" if refused else "")


@dataclass(frozen=True, slots=True)
class _Column:
    """A column; ``least``: its least width, so that columns do not move between polls."""

    name: str
    least: int = 0
    style: str = ""


_COLUMNS = (
    _Column("id"),
    _Column("operation", style="cyan"),
    _Column("client"),
    _Column("worker", style="bright_black"),
    _Column("done", 5),
    _Column("rate", 10),
    _Column("age", 8),
)
_WIDE_COLUMNS = (*_COLUMNS, _Column("moved", 20), _Column("left", 8))
_LEFT = {"id", "operation", "client"}
#: Left out in this order where there is no room; worker, done and rate always stay.
_DISPENSABLE = ("left", "moved", "age", "client", "operation", "id")


def _fitting(
    columns: Iterable[_Column], rows: Sequence[dict[str, str]], room: int
) -> list[tuple[_Column, int]]:
    """Return the columns that fit into so many characters, with their widths."""
    found = [
        (each, max(each.least, len(each.name), *(len(row[each.name]) for row in rows)))
        for each in columns
    ]
    for name in _DISPENSABLE:
        if sum(width + 1 for _, width in found) - 1 <= room:
            break
        found = [(each, width) for each, width in found if each.name != name]
    return found


def _texts(transfer: Running, *, wide: bool) -> dict[str, str]:
    """Return the text of each column."""
    share, left = transfer.share, transfer.seconds_left
    whole = f" of {size_text(transfer.expected)}" if transfer.expected else ""
    return {
        "id": transfer.id if wide else transfer.id[:_ID_WIDTH],
        "operation": transfer.operation,
        "client": transfer.client,
        "worker": str(transfer.worker),
        "done": "" if share is None else f"{int(share * 100)} %",
        "rate": rate_text(transfer.rate),
        "age": time_text(transfer.age),
        "moved": size_text(transfer.done) + whole,
        "left": "" if left is None else time_text(left),
    }


#: Eighths of a character.
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def bar(share: float | None, width: int, *, plain: bool) -> str:
    """Draw a bar: full only when all is done; dots (share None) where the length is unknown."""
    if share is None:
        return "." * width if plain else "·" * width
    if plain:
        return ("#" * int(share * width)).ljust(width, "-")
    eighths = int(share * width * 8)
    full = "█" * (eighths // 8)
    return (full + (_EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(width)


def workers_line(workers: Sequence[Worker]) -> str:
    """Return one line about the workers: how many in which state, and their busy threads."""
    if not workers:
        return "no worker"
    busy = sum(worker.busy for worker in workers)
    states: dict[str, int] = {}
    for worker in workers:
        states[worker.state] = states.get(worker.state, 0) + 1
    said = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    each = " ".join(f"{worker.worker}:{worker.busy}" for worker in workers)
    return f"workers: {said}; busy threads: {busy} ({each})"
