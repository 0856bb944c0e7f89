# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C ends every command with status 130 and one sentence, whatever it is doing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.harness import ROOT

#: Interrupts a command as soon as it imports the module that WHERE names.
SITE = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["WHERE"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("program", "words", "where"),
    [
        ("imageserver", ["share", "x"], "imageserver.server.commandline"),
        ("imageserver", ["share", "x"], "imageserver.sharing.session"),
        ("imageserver", ["serve"], "falcon"),
        ("imageserver.client", ["top"], "click"),
        ("imageserver.client", ["top"], "imageserver.client.commands.top"),
    ],
)
def test_ctrl_c_while_a_command_imports_shows_no_traceback(
    tmp_path: Path, program: str, words: list[str], where: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)

    done = subprocess.run(
        [sys.executable, "-m", program, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "WHERE": where},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )

    name = "imagectl" if program.endswith("client") else "imageserver"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{name}: interrupted.\n")
