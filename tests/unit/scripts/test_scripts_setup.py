# SPDX-License-Identifier: Apache-2.0
"""scripts/setup makes its own .venv only, and empties nobody else's."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[3] / "scripts" / "setup"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A tree of nothing but the script."""
    scripts = tmp_path / "clone" / "scripts"
    scripts.mkdir(parents=True)
    shutil.copy(SETUP, scripts)
    return scripts.parent


def refused(clone: Path) -> str:
    """Run the script, which must change nothing; return what it says."""
    before = sorted(clone.rglob("*"))
    done = subprocess.run([clone / "scripts/setup"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert sorted(clone.rglob("*")) == before
    return done.stderr


@pytest.mark.parametrize("is_there", [True, False], ids=["alive", "dangling"])
def test_a_link_is_refused_and_what_it_leads_to_stays(clone: Path, tmp_path: Path, is_there: bool):
    other = tmp_path / "other"
    if is_there:
        other.mkdir()
        (other / "precious").write_text("x")
    (clone / ".venv").symlink_to(other)
    assert refused(clone) == (
        f"setup: {clone}/.venv is a symbolic link, and what it leads to would be emptied: "
        "remove the link and run this again.\n"
    )
    assert [path.name for path in tmp_path.glob("other/*")] == ["precious"] * is_there
    assert other.exists() == is_there


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo], ids=["file", "pipe"])
def test_what_is_no_directory_is_refused(clone: Path, make: Callable[[Path], None]):
    venv = clone / ".venv"
    make(venv)
    before = venv.stat()
    assert refused(clone) == f"setup: {venv} is no directory: move it away and run this again.\n"
    assert venv.stat() == before
