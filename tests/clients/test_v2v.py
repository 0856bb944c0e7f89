# SPDX-License-Identifier: Apache-2.0
"""virt-v2v's way to upload: nbdcopy into a Python plugin of nbdkit, which speaks HTTP."""

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.disks import offered
from tests.system.harness import (
    Server,
    nbdkit,
    program,
    qemu_img,
    repeatable,
    wait_until,
)

PLUGIN = Path(__file__).with_name("v2v_plugin.py")
M = 1 << 20
SIZE = 24 * M


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    home = workplace / "v2v"
    home.mkdir()
    limits = {"max_readers_per_image": 4, "max_writers_per_image": 4}
    with Server(home, max_readers=16, max_writers=16, **limits) as running:
        yield running


def source(path: Path) -> Path:
    """Make a disk with data, zeros and holes, and data at its end."""
    some = repeatable(path.name)
    with path.open("wb") as file:
        file.write(some.randbytes(3 * M + 512))
        file.seek(9 * M)
        file.write(bytes(M) + some.randbytes(2 * M))
        file.seek(SIZE - 4096)
        file.write(some.randbytes(4096))
    return path


def upload(path: Path, url: str, sock: Path) -> None:
    with nbdkit(sock, "python", str(PLUGIN), f"url={url}", f"size={SIZE}"):
        copy = [program("nbdcopy"), "--flush", str(path), f"nbd+unix:///?socket={sock}"]
        subprocess.run(copy, check=True, timeout=60, capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["nbd", "raw"])
def test_two_disks_at_once_are_uploaded_whole(server, tmp_path, kind):
    disks = [source(tmp_path / name) for name in ("system", "data")]
    with ExitStack() as served, ThreadPoolExecutor() as pool:
        uploads = []
        for disk in disks:
            target = tmp_path / f"{disk.name}.target"
            # What was there before must not show through where the disk has holes.
            target.write_bytes(b"\xaa" * SIZE)
            options = ("--shared=0", "--discard=unmap")
            path = served.enter_context(offered(server, kind, disk.name, target, *options))
            url = f"http://127.0.0.1:{server.port}{path}"
            uploads.append(pool.submit(upload, disk, url, tmp_path / f"{disk.name}.sock"))
        for done in uploads:
            done.result()
        assert wait_until(lambda: server.holders() == [])
    for disk in disks:
        said = qemu_img("compare", "-f", "raw", "-F", "raw", disk, tmp_path / f"{disk.name}.target")
        assert said.strip() == "Images are identical."
