# SPDX-License-Identifier: Apache-2.0
"""What the bar shows on terminals of several widths."""

import io

import pytest
from rich.console import Console

from imageserver.client.showing.progress_bar import ProgressBar


def bar(columns: int, total: int) -> list[str]:
    """Return the lines of a bar that has ended."""
    out = io.StringIO()
    with ProgressBar(Console(file=out, width=columns)) as shown:
        shown.begin("download", total)
        shown.moved(total)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("columns", "amounts"), [(40, False), (71, False), (72, True), (120, True)]
)
def test_a_bar_is_one_line_on_any_terminal_and_leaves_room_for_ctrl_c(columns, amounts):
    (line,) = bar(columns, 600 << 20)

    assert line.startswith("download ━━━")
    assert (len(line) <= columns - 2, "100%" in line, "600.0/600.0 MiB" in line) == (
        True,
        True,
        amounts,
    )


def test_nothing_to_move_has_no_bar():
    assert bar(80, 0) == []
