# SPDX-License-Identifier: Apache-2.0
"""What imagectl takes for an image depends on its data, not on its size."""

import os
import time
from pathlib import Path

import pytest

from tests.system.harness import Server, qemu_nbd
from tests.system.moving import GIB, MIB, assert_same, imagectl, offer, taken

DATA = 200 * MIB
PIECES = 100


def _spread(path: Path, size: int) -> Path:
    """Make an image of random data in pieces that are equally far from each other."""
    with path.open("wb") as file:
        file.truncate(size)
        for number in range(PIECES):
            file.seek(number * (size // PIECES))
            file.write(os.urandom(DATA // PIECES))
    return path


@pytest.mark.alone
def test_a_sparse_image_of_100_gib_takes_as_long_as_its_data(server: Server, home: Path):
    def seconds(name: str, size: int) -> float:
        image, copy = _spread(home / name, size), home / f"{name}.copy"
        with qemu_nbd(image, "--read-only") as sock:
            url = offer(server, sock)
            began = time.monotonic()
            imagectl("download", url, copy)
            taking = time.monotonic() - began
        assert_same(image, copy)
        assert taken(copy) < DATA + 8 * MIB
        return taking

    full = seconds("full", DATA)
    assert seconds("sparse", 100 * GIB) < 3 * full + 3
