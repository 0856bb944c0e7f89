# SPDX-License-Identifier: Apache-2.0
"""README.md is true: its lines work as they are typed, and leave no file in the checkout."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import ROOT, Server, qemu_img, qemu_nbd, wait_until
from tests.system.test_docs_api import ADDRESS, FENCE, Demo

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_below(heading: str) -> str:
    """Return the first shell code below a heading."""
    found = FENCE.search(README, README.index(f"\n## {heading}\n"))
    assert found is not None
    assert found[1] == "sh"
    return found[2]


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory with a short path, and a checkout in which nothing appears."""
    before = sorted(os.listdir(ROOT))
    with tempfile.TemporaryDirectory(prefix="is-") as name:
        yield Path(name)
    assert sorted(os.listdir(ROOT)) == before


def test_the_tour_works_as_typed(home: Path) -> None:
    demo = Demo(home)
    with demo.running(f"IMAGESERVER_BIND={ADDRESS} scripts/run"):
        demo.directory = ROOT
        shown = demo.run(code_below("A tour"))
    assert '{"ok":true,"bytes_written":5}{"ok":true}{"ok":true}hello{"ok":true,' in shown
    assert "imageserver_image_bytes_total" in shown


def test_an_image_of_ones_own_is_served_as_typed(home: Path) -> None:
    image = home / "vda.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    qemu_img("bitmap", "--add", "-f", "qcow2", image, "backup0")
    places = {"/tmp/imagetransfer": home / "transfers", "/run/vm/vda.sock": home / "vda.sock"}  # noqa: S108
    code = code_below("Serve your own images")
    for documented, actual in places.items():
        assert documented in code
        code = code.replace(documented, str(actual))
    server = Server(home, config_dir=home / "transfers")
    bitmap = ("--bitmap=backup0", "--shared=16")
    with (
        qemu_nbd(image, *bitmap, fmt="qcow2", export="vda", sock=home / "vda.sock"),
        subprocess.Popen(
            ["bash", "-euc", code], cwd=ROOT, env=server.env, start_new_session=True
        ) as shell,
    ):
        try:
            (name,) = wait_until(lambda: list((home / "transfers").glob("*")), 60)
            path = f"/images/{name.name}/extents?context=dirty"
            wait_until(lambda: shell.poll() is not None or _serves(server, path), 20)
            assert server.request("GET", path).json == [
                {"start": 0, "length": 1 << 20, "dirty": False, "zero": True}
            ]
        finally:
            os.killpg(shell.pid, signal.SIGTERM)


def _serves(server: Server, path: str) -> bool:
    try:
        return server.request("GET", path).status == 200
    except OSError:
        return False
