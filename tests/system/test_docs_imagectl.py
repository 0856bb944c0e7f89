# SPDX-License-Identifier: Apache-2.0
"""What docs/imagectl.md shows of imagectl is what it shows today, numbers aside."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from capturing.document import blocks

from tests.system.harness import ROOT

DOCUMENT = ROOT / "docs" / "imagectl.md"
_WORD = re.compile(r"[A-Za-z]{3,}")
_ID = re.compile(r"\b[0-9a-f]{12}\b")
#: They come and go with the numbers before them.
_UNITS = {"KiB", "MiB", "GiB", "min"}


def shape(block: str) -> list[list[str]]:
    """Return the words of each line that has some: each once, for rows move and repeat.

    Which operations have just ended, and how many refusals fit on a line, is another each time.
    """
    found: list[list[str]] = []
    lines, heading, _ = block.partition("failed lately\n")
    for line in (re.sub("(?s); refused: .*?\n\n", "; refused\n", lines) + heading).splitlines():
        words = [word for word in _WORD.findall(_ID.sub("", line)) if word not in _UNITS]
        if words and words not in found:
            found.append(words)
    return sorted(found)


def test_the_terminals_in_the_docs_are_todays(tmp_path: Path):
    shutil.copy(DOCUMENT, tmp_path)
    command = [sys.executable, "-m", "capturing", "--quick", "--into", tmp_path]
    environ = os.environ | {"PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, todays = (blocks(path.read_text()) for path in (DOCUMENT, tmp_path / "imagectl.md"))
    assert {name: shape(text) for name, text in ours.items()} == {
        name: shape(text) for name, text in todays.items()
    }
    drawings = sorted(path.name for path in (tmp_path / "images").glob("imagectl-*"))
    assert drawings == sorted(path.name for path in (DOCUMENT.parent / "images").glob("imagectl-*"))
