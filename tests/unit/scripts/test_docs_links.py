# SPDX-License-Identifier: Apache-2.0
"""Every relative link of the documentation leads to a file, and to a heading in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OPERATIONS = ROOT / "docs" / "operations.md"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]+\]\(([^)\s]+)\)")


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path, level: str = "#+") -> list[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(rf"^{level} (.+)$", prose(document), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        number = sum(other == anchor or other.startswith(f"{anchor}-") for other in found)
        found.append(f"{anchor}-{number}" if anchor in found else anchor)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(prose(document)) if ":" not in link]
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = re.findall(r"(?:tests/[a-z_/]+/)?\btest_[a-z_]+\.py", document.read_text("utf-8"))
    files = [f"/{path.relative_to(ROOT)}" for path in (ROOT / "tests").rglob("test_*.py")]
    missing = [name for name in named if not any(file.endswith(f"/{name}") for file in files)]
    assert missing == []


def test_operations_has_the_sections_that_alerts_lead_to() -> None:
    named = re.compile(r"operations\.md#([\w-]+)")
    conf = ROOT / "conf"
    texts = [(conf / name).read_text() for name in ("alerts.yml", "grafana-dashboard.json")]
    sections = {section for text in texts for section in named.findall(text)}

    assert len(sections) > 5
    assert sections - set(anchors(OPERATIONS)) == set()


def test_every_section_for_trouble_is_the_runbook_of_some_alert() -> None:
    alerts = (ROOT / "conf" / "alerts.yml").read_text(encoding="utf-8")
    runbooks = re.findall(r"^ +runbook: (\S+)$", alerts, re.MULTILINE)
    sections = anchors(OPERATIONS, "##")
    troubles = sections[sections.index("watch") :]

    assert set(runbooks) == {f"docs/operations.md#{section}" for section in troubles}


def test_operations_says_where_each_alert_leads() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    alerts = (ROOT / "conf" / "alerts.yml").read_text(encoding="utf-8")
    found = re.findall(
        r"alert: Imageserver(\w+)$.*?runbook: (\S+)$", alerts, re.MULTILINE | re.DOTALL
    )
    table = text.partition("| alert | go to |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\w[\w, ]+) \| (.+) \|$", table, re.MULTILINE)
    told = {alert: goal for names, goal in rows for alert in names.split(", ")}

    assert {alert for alert, _ in found} == set(told)
    for alert, runbook in found:
        anchor = runbook.partition("#")[2]
        assert anchor == "watch" or f"(#{anchor})" in told[alert]
