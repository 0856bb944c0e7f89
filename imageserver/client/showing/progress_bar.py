# SPDX-License-Identifier: Apache-2.0
"""The progress bar on a terminal; imported there only, since rich takes as long as all else."""

from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from imageserver.client.showing.units import plain_text, rate_text

#: Columns of a terminal from which there is room for amounts beside the bar.
_WIDE = 72
#: Columns of ``^C``, which a terminal writes for Ctrl-C.
_ECHOED = 2


class _RateColumn(ProgressColumn):
    """The rate in binary units; rich's own column has decimal ones."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(rate_text(speed) if speed else "", style="progress.data.speed")


class _Progress(Progress):
    """Leaves room at the right for ``^C``, which would otherwise move the bar to the next line."""

    def get_renderable(self) -> RenderableType:
        return _Narrowed(super().get_renderable())


class _Narrowed:
    """Draws something a few columns narrower."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - _ECHOED)
        yield from console.render(self._inner, options.update(width=width))


class ProgressBar:
    """A bar with rate and remaining time."""

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        amounts = [DownloadColumn(binary_units=True), _RateColumn()]
        self._progress = _Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            *(amounts if console.width >= _WIDE else []),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            expand=True,
        )
        self._task: TaskID | None = None
        self._before = 0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Show a new bar, if there is anything to move."""
        self._before = done
        self._task = None
        if total:
            self._task = self._progress.add_task(what, total=total, completed=done)

    def moved(self, count: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._before + count)

    def note(self, sentence: str) -> None:
        """Write a line above the bar."""
        self._progress.console.print(plain_text(sentence), markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._progress.stop()
