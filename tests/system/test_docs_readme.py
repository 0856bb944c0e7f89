# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/sharing.md are true: their lines work as they are typed."""

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import ROOT, Server, qemu_img, qemu_nbd, wait_until
from tests.system.test_docs_api import ADDRESS, FENCE, Demo

README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_below(heading: str, number: int = 0) -> str:
    """Return the shell code below a heading, the first or a later one."""
    blocks = FENCE.finditer(README, README.index(f"\n## {heading}\n"))
    return [block[2] for block in blocks if block[1] == "sh"][number]


SHARING = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
#: What differs from run to run: the port, and the id.
CHOSEN = re.compile(r"(?<=127\.0\.0\.1:)[0-9]+|(?<=images/)[0-9a-f]{32}")


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
        shown = demo.run(code_below("A tour", 1))
    assert '{"ok":true,"bytes_written":5}{"ok":true}{"ok":true}hello{"ok":true,' in shown
    assert "imageserver_image_bytes_total" in shown


@pytest.fixture
def shell_environment(home: Path) -> dict[str, str]:
    """An environment with the commands on the path, and no setting."""
    (home / "t").mkdir()
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    known = {k: v for k, v in os.environ.items() if not k.startswith("IMAGESERVER_")}
    return known | {"PATH": path, "TMPDIR": str(home / "t")}


def test_a_disk_is_shared_as_typed_and_the_lines_printed_work(
    home: Path, shell_environment: dict[str, str]
) -> None:
    blocks = [FENCE.findall(README, README.index("\n## A tour\n"))[:2], FENCE.findall(SHARING)[:2]]
    (_, code), (_, shown) = blocks[0]
    assert blocks[1] == [("sh", code.replace(".venv/bin/", "")), ("text", shown)]
    command = [
        "bash",
        "-euc",
        blocks[1][0][1].replace("imageserver share", "exec imageserver share"),
    ]
    with subprocess.Popen(
        command, cwd=home, env=shell_environment, stdout=subprocess.PIPE, text=True
    ) as shell:
        try:
            assert shell.stdout is not None
            lines = list(iter(shell.stdout.readline, "Ctrl-C ends it.\n"))
            assert CHOSEN.sub("", "".join(lines)) == CHOSEN.sub("", shown).removesuffix(
                "Ctrl-C ends it.\n"
            )
            for line in lines[2:]:
                words = ["bash", "-euc", line]
                subprocess.run(words, cwd=home, env=shell_environment, check=True)
        finally:
            shell.send_signal(signal.SIGINT)
    assert shell.returncode == 0
    copies = ["disk.copy.qcow2", "disk.copy.raw", "disk.qcow2", "t"]
    assert sorted(os.listdir(home)) == copies
    assert list((home / "t").iterdir()) == []


def test_a_program_shares_as_docs_sharing_shows(
    home: Path, shell_environment: dict[str, str]
) -> None:
    code = FENCE.findall(SHARING)[-1][1]
    qemu_img("create", "-q", "-f", "qcow2", home / "disk.qcow2", "1M")
    done = subprocess.run(
        ["bash", "-euc", code],
        cwd=home,
        env=shell_environment,
        check=True,
        capture_output=True,
        timeout=30,
    )
    assert done.stdout == b'[{"start":0,"length":1048576,"zero":true,"hole":true}]'


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
