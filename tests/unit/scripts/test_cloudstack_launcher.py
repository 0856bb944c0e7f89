# SPDX-License-Identifier: Apache-2.0
"""What scripts/install --cloudstack puts where that system's agent looks for its own server."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "conf" / "cloudstack" / "imageserver"
LAUNCHER = SOURCE / "__main__.py"
#: The oldest Python of a system that runs such an agent: Enterprise Linux 8.
OLDEST = (3, 6)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Where the agent starts, with a server beside it that shows how it was started."""
    shutil.copytree(SOURCE, tmp_path / "imageserver", ignore=shutil.ignore_patterns("*.pyc"))
    script = tmp_path / "imageserver" / "__main__.py"
    current = tmp_path / "current"
    (current / "bin").mkdir(parents=True)
    command = current / "bin" / "imageserver"
    command.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$A" "$B" "$C" "$@"\n')
    command.chmod(0o755)
    text = script.read_text(encoding="utf-8")
    script.write_text(text.replace('"/opt/imageserver/current"', repr(str(current))))
    return tmp_path


def launch(parent: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imageserver", *words]
    return subprocess.run(command, cwd=parent, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", sorted(SOURCE.glob("*.py")), ids=lambda path: path.name)
def test_the_launcher_is_read_by_an_old_python_that_has_nothing_of_ours(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"), feature_version=OLDEST)
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }

    assert imported <= {"os", "re", "sys"}


def test_the_launcher_becomes_the_server_with_its_words_and_the_settings_beside_it(
    parent: Path,
) -> None:
    (parent / "image-server.env").write_text(
        "# a comment\n; and another\n\nA=one\n B = two words \nC='three'\n".replace(" B = ", " B= ")
    )
    done = launch(parent, "--listen", "1.2.3.4", "--port", "5")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        str(parent / "current"),
        *("one", "two words", "three"),
        *("--listen", "1.2.3.4", "--port", "5"),
    ]


def test_no_file_of_settings_is_fine(parent: Path) -> None:
    assert launch(parent).returncode == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"A=1\nnonsense\n", "line 2 is not VARIABLE=value."), (b"A=\xff\n", ""), (None, "Is a ")],
    ids=["no variable", "no text", "directory"],
)
def test_settings_that_cannot_be_read_are_one_sentence(
    parent: Path, text: bytes | None, said: str
) -> None:
    settings = parent / "image-server.env"
    if text is None:
        settings.mkdir()
    else:
        settings.write_bytes(text)
    done = launch(parent)

    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"imageserver: {settings}: {said}")


def test_a_server_that_is_not_installed_is_one_sentence(parent: Path) -> None:
    shutil.rmtree(parent / "current")
    done = launch(parent)

    assert done.returncode == 1
    assert done.stderr == (
        f"imageserver: {parent}/current/bin/imageserver does not start "
        "(No such file or directory); scripts/install puts it there.\n"
    )
