# SPDX-License-Identifier: Apache-2.0
"""Short runs of the proofs; the long ones are ``scripts/prove``."""

import os
import subprocess
import sys

import pytest

from tests.system.harness import ROOT


@pytest.mark.parametrize("proof", ["calls", "exports", "power", "evil", "parsers"])
def test_whatever_fails_once_leaves_nothing_wrong_and_nothing_held(proof):
    done = subprocess.run(
        [sys.executable, "-m", "proving", proof, "--quick"],
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failures" in done.stdout
