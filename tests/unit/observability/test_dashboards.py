# SPDX-License-Identifier: Apache-2.0
"""The dashboard and the alerts know the metrics that there are, and are tidy."""

import re
from itertools import combinations, pairwise
from typing import Any

import pytest

from imageserver.observability.metrics import declared
from imageserver.observability.metrics.declared import METRICS, Type
from tests.dashboards import alerts, dashboard, panels, queries

#: Labels that Prometheus gives to all it scrapes.
TARGET = {"job", "instance"}
VARIABLES = {"job": "$job", "instance": "$instance"}
Labels = dict[str, tuple[str, ...] | None]
EXPRESSIONS = queries() | {name: rule["expr"] for name, rule in alerts().items()}


def series() -> dict[str, Labels]:
    """Return the labels of every series there is, with their values where these are known."""
    found: dict[str, Labels] = {"up": {}}
    for metric in METRICS:
        if metric.type is Type.HISTOGRAM:
            found |= {f"{metric.name}{end}": dict(metric.labels) for end in ("_sum", "_count")}
            ends = tuple(f"{end:g}" for end in declared.BUCKETS)
            found[f"{metric.name}_bucket"] = dict(metric.labels) | {"le": (*ends, "+Inf")}
        else:
            found[metric.name] = dict(metric.labels)
    return found


def selectors(expression: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the series that are asked for, each with its matchers."""
    found = re.findall(r"\b(up|imageserver_\w+)\b(?:\{(.*?)\})?", expression)
    return [(name, re.findall(r'(\w+)(?:=~|!~|!=|=)"(.*?)"', rest)) for name, rest in found]


def kept(expression: str) -> set[str]:
    """Return the labels that an expression's answer may have, for all we can tell."""
    made = set(re.findall(r'label_replace\(.*?"(\w+)", "\$1"', expression, re.DOTALL))
    own = {label for name, _ in selectors(expression) for label in series()[name]}
    by = re.findall(r"\bby \((.*?)\)", expression)
    named = [set(labels.split(", ")) for labels in by]
    if not named and "sum(" in expression:
        return set()
    return set.intersection(*named) if named else own | made | TARGET


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_asks_for_what_there_is(name: str) -> None:
    known = series()
    asked = selectors(EXPRESSIONS[name])
    assert asked
    for metric, matchers in asked:
        assert metric in known
        for label, value in matchers:
            assert label in known[metric] or label in TARGET
            values = known[metric].get(label)
            assert values is None or set(value.split("|")) <= set(values)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_groups_by_labels_that_there_are(name: str) -> None:
    expression = EXPRESSIONS[name]
    own = {label for metric, _ in selectors(expression) for label in series()[metric]}
    for labels in re.findall(r"\b(?:by|on) \((.*?)\)", expression):
        assert set(labels.split(", ")) <= own | TARGET


@pytest.mark.parametrize("name", queries())
def test_a_query_is_for_the_chosen_hosts_and_its_legend_for_labels_it_keeps(name: str) -> None:
    expression = queries()[name]
    for _, matchers in selectors(expression):
        assert dict(matchers) | VARIABLES == dict(matchers)
    legend = name.partition(", ")[2]
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= kept(expression)


def test_every_metric_is_on_the_dashboard() -> None:
    asked = {name for query in queries().values() for name, _ in selectors(query)}

    assert {metric.name for metric in METRICS} == {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in asked
    } - {"up"}


def test_what_is_counted_is_asked_for_as_a_rate() -> None:
    counters = {metric.name for metric in METRICS if metric.type is not Type.GAUGE}
    for expression in EXPRESSIONS.values():
        for name, _ in selectors(expression):
            is_counter = re.sub(r"_bucket$", "", name) in counters
            as_rate = re.search(rf"\b(rate|increase)\({name}\b", expression) is not None
            assert is_counter == as_rate, expression


# The dashboard


def corners(panel: dict[str, Any]) -> tuple[int, int, int, int]:
    place = panel["gridPos"]
    return place["x"], place["y"], place["x"] + place["w"], place["y"] + place["h"]


def test_no_panel_covers_another_or_leaves_the_grid() -> None:
    found = dashboard()["panels"]
    for panel in found:
        left, top, right, bottom = corners(panel)
        assert 0 <= left < right <= 24
        assert 0 <= top < bottom
    for one, other in combinations(found, 2):
        a, b = corners(one), corners(other)
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one["title"], other["title"])


def test_panels_stand_in_the_order_of_the_file_without_gaps() -> None:
    found = [panel["gridPos"] for panel in dashboard()["panels"]]
    for one, other in pairwise(found):
        beside = (other["y"], other["x"]) == (one["y"], one["x"] + one["w"])
        assert beside or (other["y"], other["x"]) == (one["y"] + one["h"], 0)


def test_every_panel_says_what_it_is() -> None:
    found = dashboard()["panels"]
    assert len({panel["id"] for panel in found}) == len(found)
    assert len({panel["title"] for panel in found}) == len(found)
    for panel in panels().values():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert "" not in [target["legendFormat"] for target in panel["targets"]] != []


def test_data_source_job_and_host_can_be_chosen() -> None:
    found = dashboard()["templating"]["list"]

    assert [variable["name"] for variable in found] == ["datasource", "job", "instance"]
    assert (found[0]["type"], found[0]["query"]) == ("datasource", "prometheus")
    for variable in found[1:]:
        assert variable["query"]["query"] == variable["definition"]
        assert variable["includeAll"]
        # With it, "All" would be the hosts of all other jobs, too.
        assert "allValue" not in variable


# The alerts


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_is_wrong_and_where_to_look(name: str) -> None:
    rule = alerts()[name]

    assert re.fullmatch("Imageserver[A-Z][A-Za-z]+", name)
    assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["description"].endswith(".")


@pytest.mark.parametrize("name", alerts())
def test_an_alert_tells_only_labels_that_it_has(name: str) -> None:
    rule = alerts()[name]
    told = re.findall(r"\$labels\.(\w+)", "".join(rule["annotations"].values()))

    assert set(told) <= kept(rule["expr"])
