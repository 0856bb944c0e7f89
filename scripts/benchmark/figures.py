# SPDX-License-Identifier: Apache-2.0
"""Figures: what the rounds of one comparison came to, and whether that meets its target."""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

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

    def ratios(self, above: str, below: str) -> list[float]:
        """Return one ratio per round."""
        pairs = zip(self.values[above], self.values[below], strict=True)
        return [a / b for a, b in pairs]

    def median(self, name: str) -> float:
        """Return the median of one measurement."""
        return median(self.values[name])
