# SPDX-License-Identifier: Apache-2.0
"""QEMU's lock of an image file: whom it excludes, and that QEMU agrees."""

import subprocess
from pathlib import Path

import pytest

from imageserver.sharing.image_lock import hold

READ, WRITE = False, True


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [(READ, READ, True), (READ, WRITE, False), (WRITE, READ, False), (WRITE, WRITE, False)],
)
def test_readers_share_a_file_and_writers_have_it_alone(
    first: bool, second: bool, both: bool, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as one, path.open("r+b") as other:
        assert hold(one.fileno(), writable=first)
        assert hold(other.fileno(), writable=second) == both
    with path.open("r+b") as one:
        assert hold(one.fileno(), writable=True)


@pytest.mark.parametrize("writable", [READ, WRITE])
def test_qemu_writes_to_no_file_that_is_held(writable: bool, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    command = ["qemu-io", "-f", "raw", "-c", "write 0 512", str(path)]
    with path.open("r+b") as file:
        assert hold(file.fileno(), writable=writable)
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (refused.returncode, "lock" in refused.stderr) == (1, True)
    subprocess.run(command, capture_output=True, check=True)
