# SPDX-License-Identifier: Apache-2.0
"""A short soak; the long ones are ``scripts/soak``."""

import os
import subprocess
import sys

from tests.system.harness import ROOT


def soak(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "soaking", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_storm_of_kills_reloads_and_outages_costs_no_byte_no_lock_and_no_slot():
    soak("--minutes", "0.15", "--seed", "4", "--pace", "0.4")


def test_a_reload_every_second_costs_no_connection_and_no_request():
    soak("--reload", "--minutes", "0.12", "--seed", "4")
