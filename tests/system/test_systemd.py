# SPDX-License-Identifier: Apache-2.0
"""The units as files: systemd takes every line, and finds little to fear."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.system.harness import GUNICORN, ROOT, program

CONF = ROOT / "conf"
CURRENT = "/opt/imageserver/current"
#: Out of 100; systemd calls up to 30 of them "OK" or better.
WORST = 30


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [program("systemd-analyze"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units, with a program that is here."""
    for name in ("imageserver.service", "imageserver.socket"):
        text = (CONF / name).read_text()
        (tmp_path / name).write_text(text.replace(f"{CURRENT}/bin/gunicorn", str(GUNICORN)))
    return [tmp_path / "imageserver.service", tmp_path / "imageserver.socket"]


def test_systemd_understands_every_line(units: list[Path]) -> None:
    done = analyze("verify", "--man=no", "--recursive-errors=no", *units)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_service_is_exposed_to_little() -> None:
    unit = CONF / "imageserver.service"
    done = analyze("security", "--offline=yes", f"--threshold={WORST}", "--no-pager", unit)

    assert done.returncode == 0, done.stdout
    assert "Overall exposure level for imageserver.service" in done.stdout


def test_every_protection_that_is_left_out_is_explained() -> None:
    unit = CONF / "imageserver.service"
    report = json.loads(analyze("security", "--offline=yes", "--json=short", unit).stdout)
    missing = [
        check["name"].split("=")[0]
        for check in report
        if not check["set"] and float(check["exposure"] or 0) > 0
    ]

    text = unit.read_text()
    assert len(missing) > 5
    assert [name for name in missing if not any(p in text for p in name.split("/"))] == []
