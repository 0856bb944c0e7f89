# SPDX-License-Identifier: Apache-2.0
"""scripts/test-on says what it lacks before it changes anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "test-on"
USAGE = "test-on: usage: test-on [--user | --shell] SUITE [ARGUMENTS OF scripts/test OR bash]\n"


def refused(home: Path, *arguments: str) -> str:
    """Run the script without git and with an empty cache, which must stay so."""
    programs = home / "programs"
    programs.mkdir()
    for name in ("bash", "dirname"):
        path = shutil.which(name)
        assert path is not None
        (programs / name).symlink_to(path)
    cache = home / "cache"
    environ = os.environ | {"PATH": str(programs), "XDG_CACHE_HOME": str(cache)}
    command = [str(programs / "bash"), str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert not cache.exists()
    return done.stderr


@pytest.mark.parametrize("arguments", [[], ["--user"], ["../etc"], ["--unknown", "trixie"]])
def test_without_a_suite_it_says_how_it_is_used(tmp_path: Path, arguments: list[str]) -> None:
    assert refused(tmp_path, *arguments) == USAGE


def test_what_it_needs_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        expected = "git is missing; install it."
    else:
        only_root = "only root can make and enter a root directory"
        expected = f"{only_root}; run: sudo {SCRIPT} trixie"
    assert refused(tmp_path, "trixie") == f"test-on: {expected}\n"
