# SPDX-License-Identifier: Apache-2.0
"""What a terminal can show, and tables that fit on it."""

import os
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich takes as long to import as all else
    from rich.console import Console, RenderableType

#: Blanks at the end of a line, among changes of colour.
_FILL = re.compile(r" +(?=(?:\x1b\[[0-9;]*m| )*$)")


def speaks_utf8() -> bool:
    """Whether stdout is encoded in UTF-8."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def is_dumb() -> bool:
    """Whether the terminal shows the sequences that move a cursor as text."""
    return os.environ.get("TERM", "dumb") in {"dumb", "unknown"}


def write(console: "Console", table: "RenderableType") -> None:
    """Write a table without the blanks that fill its last column: they would wrap."""
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        sys.stdout.write(_FILL.sub("", line) + "\n")
