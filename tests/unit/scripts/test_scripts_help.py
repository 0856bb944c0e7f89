# SPDX-License-Identifier: Apache-2.0
"""What the shell scripts say of themselves; those that end in a Python program leave that to it."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
#: Their Python programs parse their arguments, and have a help of their own.
LEAVE_IT = {"bench", "capture", "load", "prove", "soak"}


def _shell_scripts() -> list[str]:
    found = (path for path in SCRIPTS.iterdir() if path.is_file() and os.access(path, os.X_OK))
    return sorted({path.name for path in found} - LEAVE_IT)


@pytest.mark.parametrize("name", _shell_scripts())
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_what_the_script_begins_with(name: str, flag: str, tmp_path: Path) -> None:
    command = [SCRIPTS / name, flag]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, cwd=tmp_path, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    header = (SCRIPTS / name).read_text(encoding="utf-8").splitlines()[2 : 2 + len(lines)]
    assert lines == [line.removeprefix("#").removeprefix(" ") for line in header]
    assert lines[0][0].isupper()
    assert not list(tmp_path.iterdir())
