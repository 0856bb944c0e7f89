# SPDX-License-Identifier: Apache-2.0
"""imagectl checksum: the same hex of an image here, on our server and on oVirt's."""

import contextlib
import json
import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab.ovirt import OvirtDaemon, ovirt_daemon
from ovirt_imageio import client

from imageserver.client.failures import Different, Failed
from imageserver.client.http.access import Access
from imageserver.client.http.remote import Remote
from imageserver.client.moving import verify
from imageserver.client.moving.checksum import Wanted, checksum_of_file, checksum_of_image
from imageserver.client.moving.download import Result as Fetched
from imageserver.client.moving.download import download
from imageserver.client.moving.upload import Wanted as Upload
from imageserver.client.moving.upload import upload
from imageserver.client.moving.wanted import Wanted as Download
from imageserver.client.showing.progress import Silent
from tests.clients.ovirt import LEAVES_A_CONNECTION, collected  # noqa: F401 - fixture
from tests.system.flipping import flipping
from tests.system.harness import Server, nbdkit, program, qemu_img, qemu_io, qemu_nbd
from tests.system.moving import MIB, assert_same, filled, imagectl, offer, offer_file

pytestmark = LEAVES_A_CONNECTION

SETTINGS = {"workers": 2, "max_writers": 4}
SIZE = 21 * MIB + 512
BLOCKS = ("blake2b", MIB + 4096)
WHOLE = ("whole-sha256", None)


class _Told(Silent):
    """Keeps what an operation tells."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


@pytest.fixture(scope="module")
def images(workplace: Path) -> dict[str, Path]:
    """The same disk in both formats: data, holes, zeros, in blocks that have each of them."""
    qcow2, raw = workplace / "disk.qcow2", workplace / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", qcow2, SIZE)
    commands = ("write -P 1 0 5M", "write -z 1M 64k", "write -P 2 6M 64k", "write -P 3 16M 4M")
    qemu_io(qcow2, "qcow2", *commands, f"write -P 9 {SIZE - 512} 512")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", qcow2, raw)
    return {"qcow2": qcow2, "raw": raw}


@pytest.fixture(scope="module")
def expected(images: dict[str, Path]) -> dict[tuple[str, int | None], str]:
    """What others say of the disk."""
    found = client.checksum(str(images["raw"]), block_size=BLOCKS[1], algorithm=BLOCKS[0])
    command = [program("sha256sum"), str(images["raw"])]
    whole = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    return {BLOCKS: found["checksum"], WHOLE: whole}


@pytest.fixture(scope="module")
def daemon(workplace: Path) -> Iterator[OvirtDaemon]:
    with ovirt_daemon(workplace / "ovirt") as running:
        yield running


def of_image(url: str, kind: tuple[str, int | None]) -> tuple[str, str, list[str]]:
    told = _Told()
    found = checksum_of_image(Remote(Access(url)), Wanted(*kind, connections=2), told)
    return found.checksum, found.computed, told.notes


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_file_and_its_image_on_a_server_have_the_checksum_that_others_compute(
    server: Server, images: dict[str, Path], expected: dict[tuple[str, int | None], str], fmt: str
) -> None:
    with qemu_nbd(images[fmt], "--read-only", fmt=fmt) as sock:
        url = offer(server, sock)
        for kind, checksum in expected.items():
            local = checksum_of_file(str(images[fmt]), Wanted(*kind, format=fmt), Silent())
            assert (local.checksum, local.computed) == (checksum, "here")
            assert of_image(url, kind) == (checksum, "server", [])


def test_a_server_that_computes_none_has_its_image_read(
    daemon: OvirtDaemon, images: dict[str, Path], expected: dict[tuple[str, int | None], str]
) -> None:
    with qemu_nbd(images["qcow2"], "--read-only", fmt="qcow2") as sock:
        url = daemon.add_nbd(sock, SIZE, ops=["read"])
        assert of_image(url, BLOCKS) == (expected[BLOCKS], "server", [])
        checksum, computed, (note,) = of_image(url, WHOLE)
    assert (checksum, computed) == (expected[WHOLE], "here")
    assert note.startswith("All data is read: ")


def test_the_command_prints_what_sha256sum_would(
    server: Server, images: dict[str, Path], expected: dict[tuple[str, int | None], str]
) -> None:
    url = offer_file(server, images["raw"])
    said = imagectl("checksum", url, "--algorithm", WHOLE[0]).stdout
    assert said == f"{expected[WHOLE]}  {url}\n"

    told = json.loads(imagectl("checksum", "--json", images["raw"]).stdout)
    assert told.pop("seconds") >= 0
    theirs = client.checksum(str(images["raw"]))
    assert told == {**theirs, "computed": "here"}


def test_half_a_qcow2_image_has_no_checksum(images: dict[str, Path], home: Path) -> None:
    half = home / "half.qcow2"
    half.write_bytes(images["qcow2"].read_bytes())
    os.truncate(half, half.stat().st_size // 2)
    said = imagectl("checksum", half, "--format", "qcow2", status=5).stderr
    assert "--force takes what QEMU reads of it" in said


# --verify

DISK = 24 * MIB
#: In the second block of 4 MiB.
OFFSET = 5 * MIB + 77


@pytest.fixture(scope="module")
def disk(workplace: Path) -> Path:
    """A disk of data with a hole in it."""
    return filled(workplace / "source.raw", DISK, (0, 12 * MIB), (20 * MIB, DISK))


def fetch(url: str, copy: Path, **wanted: Any) -> Fetched:
    return download(Remote(Access(url)), Download(str(copy), verify=True, **wanted), Silent())


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_bit_that_changes_in_a_download_is_found_and_named(
    server: Server, disk: Path, home: Path, fmt: str
) -> None:
    copy, told = home / "copy", "^bytes 4194304-8388607 differ; the next run fetches all again$"
    with qemu_nbd(disk, "--read-only") as sock:
        url = offer(server, sock)
        with flipping(url, OFFSET, "GET") as flip, pytest.raises(Different, match=told):
            fetch(flip.url, copy, format=fmt, connections=4)
        result = fetch(url, copy, format=fmt)
    assert (result.resumed, result.verified_by) == (0, "checksum")
    assert "identical" in qemu_img("compare", "-f", "raw", "-F", fmt, disk, copy)


def test_a_bit_that_changes_in_an_upload_is_found_and_named(
    server: Server, disk: Path, home: Path
) -> None:
    target = filled(home / "target.raw", DISK, (8 * MIB, DISK))
    with qemu_nbd(target) as sock:
        url = offer(server, sock)
        with flipping(url, OFFSET, "PUT") as flip:
            said = imagectl("upload", disk, flip.url, "--verify", status=4).stderr
            assert said == "imagectl: bytes 4194304-8388607 differ\n"
        told = json.loads(imagectl("upload", disk, url, "--verify", "--json").stdout)
    assert told["verified_by"] == "checksum"
    assert_same(disk, target)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_bit_that_changes_in_an_increment_is_found_and_named(
    server: Server, disk: Path, home: Path, fmt: str
) -> None:
    image, old = home / "image.qcow2", home / "old.raw"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    qemu_img("convert", "-f", "raw", "-O", "raw", disk, old)
    qemu_img("bitmap", "--add", image, "b0")
    qemu_io(image, "qcow2", f"write -P 7 {5 * MIB} 128k", f"write -z {21 * MIB} 64k")
    copy = old if fmt == "raw" else home / "copy"
    wanted = {"incremental": True, "format": fmt, "base": None if fmt == "raw" else str(old)}
    with qemu_nbd(image, "--read-only", "--bitmap=b0", fmt="qcow2") as sock:
        path = server.add(f"increment-{fmt}", socket=str(sock), export_bitmap="b0")
        url, told = f"http://127.0.0.1:{server.port}{path}", "^bytes 5242880-5373951 differ; the"
        with flipping(url, OFFSET, "GET") as flip, pytest.raises(Different, match=told):
            fetch(flip.url, copy, **wanted)
        result = fetch(url, copy, **wanted)
    assert (result.moved, result.verified_by) == (128 * 1024, "checksum")
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", fmt, image, copy)


def test_ovirts_checksum_is_compared_and_a_bit_that_changes_is_found(
    daemon: OvirtDaemon, disk: Path, home: Path
) -> None:
    target, told = filled(home / "target.raw", DISK), "is that of other bytes than it serves"
    with qemu_nbd(target) as sock:
        url = daemon.add_nbd(sock, DISK)
        result = upload(Remote(Access(url)), Upload(str(disk), verify=True), Silent())
        assert result.verified_by == "checksum"
        with flipping(url, OFFSET, "GET") as flip, pytest.raises(Different, match=told):
            fetch(flip.url, home / "copy")


#: An NBD server whose disk is not what was written to it, or sometimes not what is read.
_EVIL = f"""
disk = bytearray({DISK})
reads = 0
def open(readonly): return 1
def get_size(h): return len(disk)
def thread_model():
    import nbdkit
    return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS
def pread(h, buf, offset, flags):
    global reads
    buf[:] = disk[offset:offset + len(buf)]
    at = {OFFSET} - offset
    if WHEN == "read" and 0 <= at < len(buf):
        reads += 1
        buf[at] ^= reads == 1
def pwrite(h, buf, offset, flags):
    disk[offset:offset + len(buf)] = buf
    at = {OFFSET} - offset
    if WHEN == "write" and 0 <= at < len(buf):
        disk[{OFFSET}] ^= 1
def flush(h, flags): pass
"""


@pytest.mark.parametrize("when", ["write", "read"])
def test_a_bit_that_an_nbd_server_changes_is_found(
    server: Server, disk: Path, home: Path, when: str
) -> None:
    (home / "evil.py").write_text("API_VERSION = 2\n" + _EVIL.replace("WHEN", repr(when)))
    with nbdkit(home / "evil.sock", "python", home / "evil.py") as sock:
        url = offer(server, sock)
        wanted = Upload(str(disk), verify=when == "write")
        found = pytest.raises(Different, match=r"^bytes 4194304-8388607 differ")
        with found if when == "write" else contextlib.nullcontext():
            upload(Remote(Access(url)), wanted, Silent())
        with found if when == "read" else contextlib.nullcontext():
            fetch(url, home / "copy")


class _Breaking(Remote):
    """Fails where half of the disk has come."""

    def read(self, start: int, stop: int) -> Generator[bytes | bytearray]:
        for data in super().read(start, stop):
            if start >= DISK // 2:
                raise Failed("half of it has come")
            yield data
            start += len(data)


def test_what_a_disk_forgets_between_two_runs_of_a_download_is_found(
    server: Server, disk: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_SAMPLES", 0)
    copy, part = home / "copy", home / "copy.part"
    with qemu_nbd(disk, "--read-only") as sock:
        access = Access(offer(server, sock))
        with pytest.raises(Failed, match="half of it"):
            download(_Breaking(access), Download(str(copy), connections=1), Silent())
        with part.open("r+b") as file:
            file.seek(OFFSET)
            (was,) = file.read(1)
            file.seek(OFFSET)
            file.write(bytes([was ^ 1]))
        wanted = Download(str(copy), verify=True)
        with pytest.raises(Different, match="bytes 4194304-8388607 differ; the next run"):
            download(Remote(access), wanted, Silent())
        result = download(Remote(access), wanted, Silent())
    assert (result.verified_by, result.resumed) == ("checksum", 0)
    assert_same(disk, copy)
