# SPDX-License-Identifier: Apache-2.0
"""Running transfers on a terminal, below what was printed; drawn as ``imagectl top`` draws them.

Where rich is not installed (it comes with imagectl), nothing is drawn.
"""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from imageserver.client.failures import Failed
from imageserver.client.showing.status import Status, parse_status, with_rates
from imageserver.client.showing.terminal import is_dumb, speaks_utf8


def is_shown() -> bool:
    """Tell whether there is a terminal for it, and what draws."""
    has_rich = importlib.util.find_spec("rich") is not None
    return has_rich and sys.stdout.isatty() and sys.stderr.isatty() and not is_dumb()


class Progress:
    """Draws each status that it gets; ``names``: what is shown for an id."""

    def __init__(self, place: str, names: Mapping[str, str]) -> None:
        from rich.live import Live  # noqa: PLC0415 - only on terminals

        from imageserver.client.showing.top_table import TopTable  # noqa: PLC0415

        self._names = dict(names)
        self._table = TopTable(place, plain=not speaks_utf8())
        self._live = Live(console=self._table.console, auto_refresh=False, transient=True)
        self._before: Status | None = None
        with contextlib.suppress(OSError):  # the terminal has gone
            self._live.start()

    def draw(self, answer: Any) -> None:  # noqa: ANN401 - JSON
        """Draw a status as the server tells it; None: it has told none now."""
        with contextlib.suppress(OSError, Failed):
            if answer is None:
                return
            now = parse_status(answer, time.monotonic())
            shown = with_rates(now, self._before) if self._before else now
            self._before = now
            named = tuple(replace(each, id=self._name(each.id)) for each in shown.transfers)
            drawn = self._table.drawn(replace(shown, transfers=named), "")
            self._live.update(drawn, refresh=True)

    def _name(self, known: str) -> str:
        return self._names.get(known, known)

    def print(self, text: str) -> None:
        """Print text above what is drawn."""
        with contextlib.suppress(OSError):
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True, end="")

    def close(self) -> None:
        """Remove what is drawn; may be called twice."""
        with contextlib.suppress(OSError):
            self._live.stop()
