# SPDX-License-Identifier: Apache-2.0
"""scripts/release builds nothing of a source that could not be found again."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RELEASE = Path(__file__).parents[3] / "scripts" / "release"
SECTION = "## [9.8.7] - 2026-11-28\n"


def git(tree: Path, *words: str) -> None:
    who = ["-c", "user.name=T", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=tree, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A committed version 9.8.7 that has a section in the changelog, and no build module."""
    for name in ("scripts", "imageserver", ".venv/bin"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(RELEASE, tmp_path / "scripts")
    (tmp_path / "scripts/setup").write_text("#!/bin/sh\n")
    (tmp_path / "scripts/setup").chmod(0o755)
    (tmp_path / ".venv/bin/python").write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && echo built what is in "$5" && exit 1\n'
        f'cd "${{0%/*}}/../.." && exec {sys.executable} "$@"\n'
    )
    (tmp_path / ".venv/bin/python").chmod(0o755)
    (tmp_path / "imageserver/__init__.py").write_text('__version__ = "9.8.7"\n')
    (tmp_path / ".gitignore").write_text(".venv/\n__pycache__/\n")
    (tmp_path / "CHANGELOG.md").write_text(SECTION)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def refused(tree: Path) -> str:
    done = subprocess.run([tree / "scripts/release"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert not (tree / "dist").exists()
    return done.stderr


def test_what_is_not_committed_is_named_and_not_built(tree: Path):
    (tree / "new.py").write_text("")
    assert refused(tree) == "release: these are not committed: ?? new.py\n"


@pytest.mark.parametrize(
    "section",
    [
        "## [Unreleased]\n",
        "## [9.8.7]\n",
        "## [9x8.7] - 2026-11-28\n",
        "## [9.8.70] - 2026-11-28\n",
    ],
    ids=["none", "no day", "another", "a longer one"],
)
def test_a_version_without_a_dated_section_is_not_built(tree: Path, section: str):
    (tree / "CHANGELOG.md").write_text(section)
    git(tree, "commit", "-qam", "no section")
    message = 'CHANGELOG.md has no section "## [9.8.7] - YEAR-MONTH-DAY".'
    assert refused(tree) == f"release: {message}\n"


def test_a_failed_build_says_what_the_builder_said(tree: Path):
    assert refused(tree).startswith("release: the build failed: built what is in ")
