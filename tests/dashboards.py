# SPDX-License-Identifier: Apache-2.0
"""What the dashboard and the alerts in conf/ ask Prometheus, read from the files themselves."""

import json
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parents[1] / "conf"
DASHBOARD = CONF / "grafana-dashboard.json"
ALERTS = CONF / "alerts.yml"


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def panels() -> dict[str, dict[str, Any]]:
    """Return the panels that ask for something, by title."""
    return {panel["title"]: panel for panel in dashboard()["panels"] if panel["type"] != "row"}


def queries() -> dict[str, str]:
    """Return the expressions of the dashboard, as ``title, legend``."""
    return {
        f"{title}, {target['legendFormat']}": target["expr"]
        for title, panel in panels().items()
        for target in panel["targets"]
    }


def alerts() -> dict[str, dict[str, Any]]:
    """Return the alerts, by name."""
    (group,) = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}
