# SPDX-License-Identifier: Apache-2.0
"""The table of a run, as Markdown and as JSON."""

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmark.figures import Figure

_MARKS = {True: "pass", False: "**MISS**", None: ""}


def markdown(figures: Sequence[Figure], *, quick: bool) -> str:
    """Return the table, under one line about the machine."""
    lines = [_machine()]
    if quick:
        lines.append("\nSmall sizes, few rounds: these numbers mean nothing.")
    lines += [
        "",
        "| work | against | figure | spread | target | | ours | reference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(figure) for figure in figures]
    notes = [
        f"- {figure.work}, {figure.against}: {figure.note}" for figure in figures if figure.note
    ]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _line(figure: Figure) -> str:
    def text(value: float) -> str:
        return f"{value:.{_places(value)}f} {figure.unit}"

    low, high = min(figure.values), max(figure.values)
    sign = "≥" if figure.at_least else "≤"
    target = "" if figure.target is None else f"{sign} {figure.target:g} {figure.unit}"
    cells = [
        figure.work,
        figure.against,
        text(figure.value),
        f"{low:.{_places(low)}f} to {high:.{_places(high)}f}",
        target,
        _MARKS[figure.passed],
        figure.ours,
        figure.reference,
    ]
    return f"| {' | '.join(cells)} |"


def _places(value: float) -> int:
    return 2 if value < 10 else 1 if value < 100 else 0  # noqa: PLR2004 - three digits or so


def _machine() -> str:
    cpus = len(os.sched_getaffinity(0))
    day = time.strftime("%Y-%m-%d")
    return f"{day}, {_cpu_model()}, {cpus} CPUs, Linux {platform.release()}"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def as_json(figures: Sequence[Figure], *, quick: bool) -> str:
    """Return everything a figure holds."""
    rows = [asdict(f) | {"value": f.value, "passed": f.passed} for f in figures]
    found = {"machine": _machine(), "quick": quick, "figures": rows}
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"
