# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md has what is declared."""

from pathlib import Path

import pytest

from imageserver.observability.metrics import declared
from imageserver.observability.metrics.declared import METRICS, Metric, Type

ROOT = Path(__file__).parents[3]


def table(type_: Type) -> str:
    """Return one table of docs/metrics.md."""
    lines = ["| metric | labels | meaning |", "| --- | --- | --- |"]
    lines += [
        f"| `{metric.name}` | {labels(metric)} | {metric.help} |"
        for metric in METRICS
        if metric.type is type_
    ]
    return "\n".join(lines) + "\n"


def labels(metric: Metric) -> str:
    return "; ".join(
        f"`{name}`" + (f": {', '.join(found)}" if found else "") for name, found in metric.labels
    )


@pytest.mark.parametrize("type_", Type, ids=lambda type_: type_.value)
def test_the_documentation_has_every_metric(type_: Type) -> None:
    """When this fails, copy what it expected into docs/metrics.md."""
    assert table(type_) in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_documentation_names_the_buckets() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

    assert ", ".join(f"{end:g}" for end in declared.BUCKETS) in text
