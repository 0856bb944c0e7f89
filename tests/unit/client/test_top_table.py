# SPDX-License-Identifier: Apache-2.0
"""What imagectl top shows on terminals of several widths, and to programs."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from imageserver.client.commands.top import _write_json
from imageserver.client.showing.status import Ended, Lately, Running, Slots, Status, Worker
from imageserver.client.showing.top_table import TopTable, bar, workers_line

STATUS = Status(
    (
        Running("0123456789abcdef", "read", "127.0.0.1", 1234567, 40 << 20, 100 << 20, 3.3e7, 4.5),
        Running("x", "extents", "192.168.100.200", 1234568, 0, 0, 1024.0, 4.5),
    ),
    (Worker(1234567, "accepting", 1),),
    1.0,
)


def shown(width: int) -> list[str]:
    """Return the lines of the table."""
    out = io.StringIO()
    table = TopTable("host:1", plain=True)
    table.console = Console(file=out, width=width, highlight=False)
    table.console.print(table.drawn(STATUS, ""))
    return [line.rstrip() for line in out.getvalue().splitlines()[-3:]]


@pytest.mark.parametrize("width", [30, 40, 50, 60, 72, 80, 109, 110, 200])
def test_rate_and_worker_are_whole_on_any_terminal(width: int):
    head, *lines = shown(width)
    assert all(len(line) <= width for line in (head, *lines))
    assert [name in head for name in ("worker", "done", "rate")] == [True] * 3
    assert [("1234567" in line, "31.5 MiB/s" in line) for line in lines[:1]] == [(True, True)]
    assert [("1234568" in line, "1 KiB/s" in line) for line in lines[1:]] == [(True, True)]


@pytest.mark.parametrize(
    ("width", "names"),
    [
        (30, "worker done rate"),
        (60, "id operation worker done rate"),
        (80, "id operation client worker done rate age"),
        (120, "id operation client worker done rate age moved left"),
    ],
)
def test_a_narrow_terminal_has_fewer_columns(width: int, names: str):
    assert shown(width)[0].split() == names.split()


LATELY = Lately(
    {"read": Slots(3, 8, 4), "write": Slots(0, 1, None)},
    (Ended("0123456789abcdef", "read", "10.0.0.1", 206, 7, 7 << 20, 3.5, 90.0, ""),),
    (Ended("x", "write", "10.0.0.2", 504, 1, 0, 60.0, 12.0, "BackendTimeout"),),
    {"image_busy": 2, "no_read_slot": 1},
    ("the disk of it is full",),
)


def test_what_there_is_and_what_has_ended_is_told_with_its_reason():
    out = io.StringIO()
    table = TopTable("host:1", plain=True)
    table.console = Console(file=out, width=100, highlight=False)
    table.console.print(table.drawn(Status((), (), 1.0, LATELY), ""))
    assert [line.rstrip() for line in out.getvalue().splitlines()[2:]] == [
        "slots: read 3 of 8 (4 an image), write 0 of 1; refused: 2 image_busy, 1 no_read_slot",
        "not ready: the disk of it is full",
        "",
        "failed lately",
        "x write 10.0.0.2 BackendTimeout (504), 1 time, 12 s ago",
        "",
        "finished lately",
        "0123456789ab read 10.0.0.1 7 MiB (206), 7 times, 1:30 min ago",
    ]


def test_programs_are_told_the_names_of_the_servers_status(capsys: pytest.CaptureFixture[str]):
    _write_json(iter([(STATUS, "")]), 0)
    (worker,) = json.loads(capsys.readouterr().out)["workers"]
    assert worker == {"worker": 1234567, "state": "accepting", "busy": 1}


@pytest.mark.parametrize(
    ("share", "drawn", "plain"),
    [
        (0.0, "    ", "----"),
        (0.5, "██  ", "##--"),
        (0.54, "██▏ ", "##--"),
        (1.0, "████", "####"),
        (None, "····", "...."),
    ],
)
def test_bars(share: float | None, drawn: str, plain: str) -> None:
    assert (bar(share, 4, plain=False), bar(share, 4, plain=True)) == (drawn, plain)


@given(st.floats(0, 1), st.integers(1, 80), st.booleans())
def test_a_bar_has_its_width_and_is_full_only_at_the_end(
    share: float, width: int, plain: bool
) -> None:
    drawn = bar(share, width, plain=plain)
    assert len(drawn) == width
    assert (drawn in {"#" * width, "█" * width}) == (share == 1)


def test_workers_are_counted_by_state() -> None:
    workers = (Worker(7, "accepting", 2), Worker(8, "draining", 0), Worker(9, "accepting", 1))
    line = "workers: 2 accepting, 1 draining; busy threads: 3 (7:2 8:0 9:1)"
    assert (workers_line(workers), workers_line(())) == (line, "no worker")
