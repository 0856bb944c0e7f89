# SPDX-License-Identifier: Apache-2.0
"""Figures: what the rounds of one comparison came to, and whether that meets its target."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Measure = Callable[[int], float]
"""One measurement; the argument is the round's number."""


@dataclass(slots=True)
class Figure:
    """One line of the table."""

    work: str
    against: str
    """What it is compared with, or what is counted."""
    values: list[float]
    """One per round: ratios, or what ``unit`` says."""
    target: float | None = None
    at_least: bool = True
    """Whether the target is a least or a most."""
    unit: str = "x"
    worst: bool = False
    """Judge the worst round, not the median: for bounds that no round may pass."""
    ours: str = ""
    reference: str = ""
    note: str = ""

    @property
    def value(self) -> float:
        """What is judged."""
        if self.worst:
            return min(self.values) if self.at_least else max(self.values)
        return median(self.values)

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


@dataclass(slots=True)
class Rounds:
    """Several measurements taken in turns: A B C, A B C, ..."""

    values: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def take(cls, count: int, **measures: Measure) -> "Rounds":
        """Measure each in turn, ``count`` times."""
        rounds = cls({name: [] for name in measures})
        for number in range(count):
            for name, measure in measures.items():
                rounds.values[name].append(measure(number))
        return rounds

    def compare(
        self, figure: Figure, text: Callable[[float], str], ours: str, reference: str
    ) -> Figure:
        """Make a figure of two measurements' ratios; ``text`` shows their medians."""
        pairs = zip(self.values[ours], self.values[reference], strict=True)
        figure.values = [a / b for a, b in pairs]
        figure.ours, figure.reference = (
            text(median(self.values[name])) for name in (ours, reference)
        )
        return figure

    def speed(  # noqa: PLR0913 - what, against whom, how much
        self,
        work: str,
        against: str,
        size: int,
        target: float | None = None,
        *,
        ours: str = "ours",
        reference: str = "",
    ) -> Figure:
        """Compare seconds that it took to move ``size`` bytes; more is faster."""
        inverse = Rounds({name: [1 / taken for taken in v] for name, v in self.values.items()})
        figure = Figure(work, against, [], target)
        return inverse.compare(
            figure, lambda rate: f"{size * rate / MIB:.0f} MiB/s", ours, reference or against
        )

    def rate(self, work: str, against: str, target: float | None, reference: str) -> Figure:
        """Compare requests per second."""
        figure = Figure(work, against, [], target)
        return self.compare(figure, lambda rate: f"{rate:.0f}/s", "ours", reference)

    def less(
        self, figure: Figure, text: Callable[[float], str], reference: str, ours: str = "ours"
    ) -> Figure:
        """Compare costs: the less, the better."""
        figure.at_least = False
        return self.compare(figure, text, ours, reference)


def shown(size: int) -> str:
    """Return a size as the table has it."""
    unit, name = next(u for u in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if size >= u[0])
    return f"{size // unit} {name}"
