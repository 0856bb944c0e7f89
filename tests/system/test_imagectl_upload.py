# SPDX-License-Identifier: Apache-2.0
"""imagectl upload: what the server serves afterwards is what the file was."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.disks import offered
from tests.system.harness import Server, nbdkit, qemu_img, qemu_io, qemu_nbd, wait_until
from tests.system.moving import (
    IMAGES,
    KIB,
    MIB,
    assert_same,
    filled,
    finish,
    imagectl,
    offer,
    offer_file,
    running,
    taken,
)
from tests.system.skips import needs

SETTINGS = {"max_writers": 4}


@pytest.mark.parametrize(
    ("what", "kind"), [*((what, "nbd") for what in IMAGES), ("sparse", "raw"), ("sectors", "raw")]
)
def test_an_image_replaces_a_disk(server: Server, home: Path, name: str, what: str, kind: str):
    image = IMAGES[what](home / "image.raw")
    size = image.stat().st_size
    old = filled(home / "disk.raw", size, (0, min(size, 32 * MIB)))
    with offered(server, kind, name, old, "--discard=unmap") as path:
        imagectl("upload", image, f"http://127.0.0.1:{server.port}{path}", "--verify")
    # Holes of less than 64 KiB go up as zeros.
    assert_same(image, old, holes=what not in {"fragmented", "sectors"})


def test_one_writer_is_enough(home: Path):
    image = IMAGES["clusters"](home / "image.raw")
    old = filled(home / "disk.raw", image.stat().st_size, (0, MIB))
    with Server(home, workers=2) as server, qemu_nbd(old, "--discard=unmap") as sock:
        imagectl("upload", image, offer(server, sock), "--connections", 8)
        assert "status=409" not in server.log
    assert_same(image, old)


@pytest.mark.parametrize("size", [0, 1, 3 * MIB + 5])
def test_a_file_on_the_server_is_replaced(server: Server, home: Path, size: int):
    image = filled(home / "image.raw", size, (size // 2, size))
    imagectl("upload", image, offer_file(server, home / "there.raw"), "--verify")
    assert_same(image, home / "there.raw", holes=False)


@pytest.mark.parametrize("options", [(), ("--pad",)], ids=["as it is", "padded"])
def test_a_file_becomes_smaller_unless_it_is_to_be_padded(
    server: Server, home: Path, options: tuple[str, ...]
):
    image, there = filled(home / "image.raw", 1000, (0, 1000)), home / "there.raw"
    filled(there, MIB, (0, MIB))
    imagectl("upload", image, offer_file(server, there), "--verify", *options)
    assert there.read_bytes() == image.read_bytes() + bytes(MIB - 1000 if options else 0)


def test_a_file_that_is_not_there_yet_needs_no_padding(server: Server, home: Path):
    image, there = filled(home / "image.raw", 1000, (0, 1000)), home / "there.raw"
    imagectl("upload", image, offer_file(server, there), "--pad")
    assert there.read_bytes() == image.read_bytes()


@pytest.fixture
def device(home: Path) -> Iterator[Path]:
    command = ["losetup", "--find", "--show", str(filled(home / "backing", MIB, (0, MIB)))]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield Path(path)
    subprocess.run(["losetup", "--detach", path], check=True)


@needs("loop devices")
def test_the_rest_of_a_device_is_zeroed_if_asked(server: Server, home: Path, device: Path):
    image, before = filled(home / "image.raw", 5000, (0, 5000)), device.read_bytes()
    url = offer_file(server, device)
    assert imagectl("upload", image, url, "--verify", "-q", status=5).stderr == (
        f"imagectl: {image} has 5000 bytes, the image {MIB}: "
        "what lies behind is as it was, --pad zeroes it\n"
    )
    assert server.request("GET", url.partition(str(server.port))[2]).body == (
        image.read_bytes() + before[5000:]
    )
    imagectl("upload", image, url, "--verify", "--pad")
    assert server.request("GET", url.partition(str(server.port))[2]).body == (
        image.read_bytes() + bytes(MIB - 5000)
    )


def test_the_disk_in_a_qcow2_image_is_uploaded(server: Server, home: Path):
    image, disk = home / "image.qcow2", filled(home / "disk.raw", 64 * MIB, (0, 64 * MIB))
    qemu_img("create", "-q", "-f", "qcow2", image, "64M")
    qemu_io(image, "qcow2", "write -q -P 1 3M 5M", "write -q -P 2 63M 1M")
    with qemu_nbd(disk, "--discard=unmap") as sock:
        url = offer(server, sock)
        unsaid = imagectl("upload", image, url, status=5).stderr
        assert "--format qcow2" in unsaid
        assert unsaid.count("\n") == 1
        imagectl("upload", image, url, "--format", "qcow2", "--verify")
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", image, disk)
    assert taken(disk) == 6 * MIB


def test_a_smaller_file_is_padded_if_asked(server: Server, home: Path):
    image = filled(home / "image.raw", 2 * MIB + 100, (0, 2 * MIB + 100))
    disk = filled(home / "disk.raw", 4 * MIB, (0, 4 * MIB))
    with qemu_nbd(disk, "--discard=unmap") as sock:
        url = offer(server, sock)
        refused = imagectl("upload", image, url, status=5).stderr
        assert refused == (
            f"imagectl: {image} has 2097252 bytes, the image 4194304: --pad makes the rest zeros\n"
        )
        imagectl("upload", image, url, "--pad", "--verify")
    assert disk.read_bytes() == image.read_bytes() + bytes(2 * MIB - 100)


def test_a_larger_file_is_refused(server: Server, home: Path):
    image, disk = filled(home / "image.raw", 2 * MIB), filled(home / "disk.raw", MIB, (0, MIB))
    before = disk.read_bytes()
    with qemu_nbd(disk) as sock:
        refused = imagectl("upload", image, offer(server, sock), status=5).stderr
    assert refused == f"imagectl: {image} has 2097152 bytes, more than the image's 1048576\n"
    assert disk.read_bytes() == before


def test_a_read_only_image_is_refused(server: Server, home: Path):
    image, disk = filled(home / "image.raw", MIB), filled(home / "disk.raw", MIB)
    with qemu_nbd(disk, "--read-only") as sock:
        refused = imagectl("upload", image, offer(server, sock), status=3).stderr
    assert refused == "imagectl: the image on the server is read-only\n"


def test_a_disk_that_forgets_is_found_out(server: Server, home: Path):
    image = filled(home / "image.raw", MIB, (0, MIB))
    with nbdkit(home / "null.sock", "null", "size=1M") as sock:
        different = imagectl("upload", image, offer(server, sock), "--verify", status=4).stderr
    assert different == "imagectl: bytes 0-1048575 differ\n"


@pytest.mark.parametrize("name", ["image.raw", "image.raw.part", "link"])
def test_what_a_download_left_half_done_is_not_uploaded(server: Server, home: Path, name: str):
    kept = home / name
    state = home / f"{name}.{'' if name.endswith('.part') else 'incremental.'}state"
    if name == "link":
        kept.symlink_to(home / "image.raw")
        state = home / "image.raw.incremental.state"
    filled(kept, MIB, (0, MIB))
    disk = filled(home / "disk.raw", MIB)
    state.touch()
    with qemu_nbd(disk) as sock:
        url = offer(server, sock)
        assert imagectl("upload", kept, url, status=5).stderr == (
            f"imagectl: {kept} is the rest of an interrupted download, as {state} tells: "
            "download it to its end first\n"
        )
        assert disk.read_bytes() == bytes(MIB)
        state.unlink()
        imagectl("upload", kept, url)
    assert disk.read_bytes() == kept.read_bytes()


def test_a_busy_image_is_waited_for(home: Path):
    image = filled(home / "image.raw", 4 * MIB, (0, 4 * MIB))
    disk = filled(home / "disk.raw", 4 * MIB)
    with Server(home, workers=2) as server, qemu_nbd(disk) as sock:
        url = offer(server, sock)
        path = url.partition(str(server.port))[2]
        head = f"PATCH {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-{64 * KIB - 1}\r\n"
        head += f"Content-Length: {64 * KIB}\r\n\r\n"
        with server.raw(head.encode() + b"x") as writer:  # which holds its range
            wait_until(lambda: f"WRITE {url.rpartition('/')[2]}" in server.holders())
            refused = imagectl("upload", image, url, "--patience", 0, status=1).stderr
            assert refused.endswith(": image busy\n")
            with running("upload", image, url, "--verify") as moving:
                wait_until(lambda: server.log.count("status=409") > 1)
                writer.close()
                finish(moving)
    assert_same(image, disk)


def test_an_interrupted_upload_says_what_to_do(server: Server, home: Path):
    image = filled(home / "image.raw", 16 * MIB, (0, 16 * MIB))
    disk = filled(home / "disk.raw", 16 * MIB)
    limits = ("--filter=rate", "file", str(disk), f"rate={64 * MIB}", "burstiness=0.1")
    with (
        nbdkit(home / "slow.sock", *limits) as sock,
        running("upload", image, offer(server, sock)) as moving,
    ):
        wait_until(lambda: taken(disk) > MIB, 30)
        moving.send_signal(signal.SIGINT)
        assert finish(moving, 130) == (
            "imagectl: interrupted: the image on the server is incomplete; "
            "the same command makes it whole.\n"
        )
