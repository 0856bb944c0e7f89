# SPDX-License-Identifier: Apache-2.0
"""What imagectl top shows on terminals of several widths, and to programs."""

import io
import json

import pytest
from rich.console import Console

from imageserver.client.commands.top import _Shown, _write_json
from imageserver.client.showing.table import Running, Status, Worker

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
    show = _Shown("host:1", plain=True)
    show.console = Console(file=out, width=width, highlight=False)
    show.console.print(show.picture(STATUS, ""))
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


def test_programs_are_told_the_names_of_the_servers_status(capsys: pytest.CaptureFixture[str]):
    _write_json(iter([(STATUS, "")]), 0)
    (worker,) = json.loads(capsys.readouterr().out)["workers"]
    assert worker == {"worker": 1234567, "state": "accepting", "busy": 1}
