# SPDX-License-Identifier: Apache-2.0
"""The alerts before promtool: each fires for what it is for, and not for what comes close."""

import json
import subprocess
from typing import Any

from tests.dashboards import ALERTS, alerts
from tests.system.skips import beside_python, needs

pytestmark = needs("prometheus")


def test_promtool_finds_nothing_wrong():
    promtool("check", "rules", ALERTS)


def promtool(*arguments: object) -> None:
    command = [str(beside_python("promtool")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


# In promtool's notation: 0x20 is 0 for 20 minutes, 0+60x40 grows by 60 each minute for 40.
READY, ACCEPTING = 'ready{check="slot_table"}', 'workers{state="accepting"}'
DEATHS, RECLAIMED = "worker_deaths_total", 'slots_reclaimed_total{kind="write"}'
WRITTEN = 'image_bytes_total{direction="write",backend="nbd"}'
READ = 'image_bytes_total{direction="read",backend="nbd"}'
REPLACING = 'transfer_max_age_seconds{operation="replace"}'
READING = 'transfer_max_age_seconds{operation="read"}'
NO_SLOT = 'refusals_total{reason="no_write_slot"}'
CONFLICTS = 'lock_conflicts_total{operation="write"}'
TURNED_AWAY = 'connections_refused_total{reason="no_descriptor"}'
TLS_FAILURES = "tls_handshake_failures_total"
FAILURES = 'backend_errors_total{backend="nbd",kind="timeout"}'
FULL = 'backend_errors_total{backend="file",kind="no_space"}'

#: After half an hour of these values, these alerts fire and no others.
HALF_AN_HOUR: dict[str, tuple[dict[str, str], set[str]]] = {
    "down": ({"up": "1x20 0x20"}, {"Down"}),
    "down_a_moment_ago": ({"up": "1x29 0x20"}, set()),
    "no_target": ({"up": "_x40"}, {"Unwatched"}),
    "no_target_for_now": ({"up": "1x24 _x20"}, set()),
    "not_ready": ({READY: "1x20 0x20"}, {"NotReady"}),
    "ready_again": ({READY: "0x20 1x20"}, set()),
    "nobody_accepts": ({ACCEPTING: "3x20 0x20"}, {"NoWorkerAccepts"}),
    "one_accepts": ({ACCEPTING: "3x20 1x20"}, set()),
    "one_died": ({DEATHS: "7x20 8x20"}, {"WorkerDied"}),
    "many_died": ({DEATHS: "7x20 13x20"}, {"WorkerDied", "WorkersKeepDying"}),
    "many_died_long_ago": ({DEATHS: "7x5 13x40"}, set()),
    "reclaimed": ({RECLAIMED: "0x20 1x20"}, {"SlotsReclaimed"}),
    "reclaimed_long_ago": ({RECLAIMED: "0x5 1x40"}, set()),
    "damaged": ({"metrics_damaged_files": "0x20 1x20"}, {"MetricsDamaged"}),
    "damaged_a_moment_ago": ({"metrics_damaged_files": "0x27 1x20"}, set()),
    "stuck": ({REPLACING: "0+60x40", WRITTEN: "9x40"}, {"TransferStuck"}),
    "stuck_beside_reads": (
        {REPLACING: "0+60x40", WRITTEN: "9x40", READING: "0+60x40", READ: "0+99999999x40"},
        {"TransferStuck"},
    ),
    "trickles": ({READING: "0+60x40", READ: "0+6000x40"}, {"TransferStuck"}),
    "slow": ({REPLACING: "0+60x40", WRITTEN: "0+600000x40"}, set()),
    "idle": ({REPLACING: "0x40", WRITTEN: "9x40"}, set()),
    "only_begun": ({REPLACING: "0x25 0+60x40", WRITTEN: "9x40"}, set()),
    "old": ({READING: "22000+60x40", READ: "0+99999999x40"}, {"TransferOld"}),
    "five_hours": ({READING: "16200+60x40", READ: "0+99999999x40"}, set()),
    "no_slot": ({NO_SLOT: "0+60x40"}, {"ClientsRefused"}),
    "no_slot_for_now": ({NO_SLOT: "0x25 600x40"}, set()),
    "other_refusals": ({'refusals_total{reason="not_found"}': "0+60x40"}, set()),
    "conflicts": ({CONFLICTS: "0+90x40"}, {"LockConflicts"}),
    "few_conflicts": ({CONFLICTS: "0+30x40"}, set()),
    "conflicts_for_now": ({CONFLICTS: "0x25 900x40"}, set()),
    "turned_away": ({TURNED_AWAY: "0x20 1x40"}, {"ConnectionsRefused"}),
    "turned_away_long_ago": ({TURNED_AWAY: "0x5 1x40"}, set()),
    "handshakes": ({TLS_FAILURES: "0+60x40"}, {"TlsHandshakesFail"}),
    "few_handshakes": ({TLS_FAILURES: "0+3x40"}, set()),
    "handshakes_for_now": ({TLS_FAILURES: "0x25 600x40"}, set()),
    "failures": ({FAILURES: "0x25 5x40"}, {"BackendErrors"}),
    "few_failures": ({FAILURES: "0x25 2x40"}, set()),
    "full": ({FULL: "0x25 1x40"}, {"DiskFull"}),
    "full_long_ago": ({FULL: "0x5 1x40"}, set()),
}


def a_target(name: str) -> str:
    """Return a series as Prometheus has it of one server."""
    metric, _, labels = name.rstrip("}").partition("{")
    own = 'job="imageserver",instance="a:1"' + (labels and f",{labels}")
    return f"{metric if metric == 'up' else f'imageserver_{metric}'}{{{own}}}"


def an_experiment(name: str, values: dict[str, str], expected: set[str]) -> dict[str, Any]:
    fired = [{"labels": f'{{alertname="Imageserver{one}"}}', "value": 1} for one in expected]
    return {
        "name": name,
        "interval": "1m",
        "input_series": [
            {"series": a_target(metric), "values": numbers}
            for metric, numbers in ({"up": "1x40"} | values).items()
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "30m",
                "exp_samples": fired,
            }
        ],
    }


def test_alerts_fire_for_what_they_are_for_and_nothing_else(tmp_path):
    experiments = tmp_path / "experiments.yml"
    tests = [an_experiment(name, *case) for name, case in HALF_AN_HOUR.items()]
    experiments.write_text(
        json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": tests})
    )
    promtool("test", "rules", experiments)


def test_every_alert_has_been_seen_to_fire():
    fired = set.union(*(expected for _, expected in HALF_AN_HOUR.values()))
    assert {f"Imageserver{name}" for name in fired} == alerts().keys()
