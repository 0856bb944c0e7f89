# SPDX-License-Identifier: Apache-2.0
"""imagectl and qcow2 images that name other files: nothing is read that nobody asked for."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Server, qemu_img, qemu_io, qemu_nbd
from tests.system.moving import IMAGECTL, KIB, MIB, filled, imagectl, offer

_SIZE = 4 * MIB
#: The type of the header extension that records a backing file's format.
_BACKING_FORMAT = bytes.fromhex("e2792aca")


@pytest.fixture
def secret(home: Path) -> Path:
    return filled(home / "secret", _SIZE, (0, _SIZE))


def refused(server: Server, home: Path, image: Path, *options: str) -> str:
    """Upload an image, which must fail and write nothing; return why."""
    options = ("--format", "qcow2", *options)
    disk = filled(home / "disk.raw", _SIZE, (0, _SIZE))
    before = disk.read_bytes()
    with qemu_nbd(disk) as sock:
        said = imagectl("upload", image, offer(server, sock), *options, status=5).stderr
    assert disk.read_bytes() == before
    return said


@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_a_backing_file_is_not_uploaded(server: Server, home: Path, secret: Path, version: str):
    image = home / "evil.qcow2"
    named = ("-b", secret, "-F", "raw", "-o", f"compat={version}")
    qemu_img("create", "-q", "-f", "qcow2", *named, image)
    assert refused(server, home, image) == (
        f"imagectl: {image} has the backing file '{secret}': "
        "--backing uploads what that holds as well\n"
    )


@pytest.mark.parametrize(
    "name", ["nbd:unix:/nowhere", 'json:{"driver":"nbd","path":"/nowhere"}', "gone"]
)
def test_a_backing_file_is_not_even_opened(server: Server, home: Path, secret: Path, name: str):
    image = home / "evil.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", image)
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", image)
    assert f"{image} has the backing file {name!r}: --backing" in refused(server, home, image)


def test_an_external_data_file_is_not_uploaded(server: Server, home: Path):
    image, content = home / "evil.qcow2", home / "content"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={content}", image, str(_SIZE))
    assert refused(server, home, image) == (
        f"imagectl: {image} has its data in another file, which it names: "
        "--backing uploads what that holds\n"
    )


def test_a_backing_file_is_uploaded_if_asked(server: Server, home: Path, secret: Path):
    overlay, disk = home / "overlay.qcow2", filled(home / "disk.raw", _SIZE)
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", overlay)
    qemu_io(overlay, "qcow2", "write -q -P 1 1M 64k")
    asked = ("--format", "qcow2", "--backing", "--verify")
    with qemu_nbd(disk) as sock:
        imagectl("upload", overlay, offer(server, sock), *asked)
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", overlay, disk)


def based(image: Path, base: object, fmt: str) -> Path:
    """Make an overlay that records its base's format."""
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", fmt, image, _SIZE)
    return image


def forget_format(image: Path) -> Path:
    """Have an overlay name its base without a format, as older versions of qemu-img made them."""
    text = image.read_bytes()
    assert text.count(_BACKING_FORMAT) == 1
    image.write_bytes(text.replace(_BACKING_FORMAT, b"\0" * 3 + b"\1"))
    return image


@pytest.fixture
def guest(home: Path, secret: Path) -> Path:
    """A raw disk whose guest wants the secret: what it wrote looks like an overlay of that."""
    disk = based(home / "guest.raw", secret, "raw")
    os.truncate(disk, _SIZE)
    return disk


def unrecorded(image: Path, name: str) -> str:
    return (
        f"imagectl: {image} has the backing file {name!r}, but does not record its format, which "
        "would be guessed: qemu-img rebase -u -f qcow2 -F FORMAT -b NAME FILE records it\n"
    )


@pytest.mark.parametrize("above", range(3))
def test_no_format_in_a_chain_is_guessed(server: Server, home: Path, guest: Path, above: int):
    unsaid = image = forget_format(based(home / "0.qcow2", guest.name, "raw"))
    for number in range(above):
        image = based(home / f"{number + 1}.qcow2", image.name, "qcow2")
    assert refused(server, home, image, "--backing") == unrecorded(unsaid, guest.name)
    qemu_img("rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", guest.name, unsaid)
    disk = filled(home / "disk.raw", _SIZE)
    with qemu_nbd(disk) as sock:
        imagectl("upload", image, offer(server, sock), "--format", "qcow2", "--backing")
    assert disk.read_bytes() == guest.read_bytes()


def test_an_image_that_is_based_on_itself_is_refused(server: Server, home: Path):
    image = based(home / "image.qcow2", "image.qcow2", "qcow2")
    said = refused(server, home, image, "--backing")
    assert said == f"imagectl: {image} is based on more than 200 images, or on itself\n"


def test_a_server_in_a_chain_is_read_if_asked(server: Server, home: Path, secret: Path):
    disk = filled(home / "disk.raw", _SIZE)
    with qemu_nbd(secret, "--read-only") as below, qemu_nbd(disk) as sock:
        image = based(home / "image.qcow2", f"nbd+unix:///?socket={below}", "raw")
        imagectl("upload", image, offer(server, sock), "--format", "qcow2", "--backing")
        assert disk.read_bytes() == secret.read_bytes()
    forget_format(image)
    assert "does not record its format" in refused(server, home, image, "--backing")


def test_a_name_with_a_colon_is_a_file(server: Server, home: Path):
    qemu_img("create", "-q", "-f", "qcow2", home / "a:b.qcow2", str(_SIZE))
    qemu_io(home / "a:b.qcow2", "qcow2", "write -q -P 1 1M 64k")
    disk = filled(home / "disk.raw", _SIZE)
    with qemu_nbd(disk) as sock:
        url, here = offer(server, sock), os.environ | {"PYTHONPATH": os.getcwd()}
        for arguments in (
            ["upload", "a:b.qcow2", url, "--format", "qcow2"],
            ["download", url, "c:d.qcow2", "--format", "qcow2"],
        ):
            command = [*IMAGECTL, *arguments]
            subprocess.run(command, cwd=home, env=here, check=True, capture_output=True)
    for image in ("a:b.qcow2", "c:d.qcow2"):
        # qemu-img, too, takes a:b for a protocol.
        assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", home / image, disk)


@pytest.fixture
def changed(server: Server, home: Path) -> Iterator[str]:
    """Offer a disk with a bitmap, and one cluster written since; all else is zeros."""
    disk = home / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", disk, str(_SIZE))
    qemu_img("bitmap", "--add", "-f", "qcow2", disk, "bitmap0")
    qemu_io(disk, "qcow2", "write -q -P 1 3M 64k")
    with qemu_nbd(disk, "--read-only", "--bitmap=bitmap0", fmt="qcow2") as sock:
        path = server.add(home.name, socket=str(sock), export_bitmap="bitmap0")
        yield f"http://127.0.0.1:{server.port}{path}"


def test_a_raw_base_stays_raw_whatever_the_guest_wrote(changed: str, home: Path, secret: Path):
    base, overlay, flat = home / "base.raw", home / "overlay.qcow2", home / "flat.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", base)
    with base.open("r+b") as file:
        file.truncate(_SIZE)
    asked = ("download", changed, overlay, "--incremental", "--base", base)
    assert imagectl(*asked, status=5).stderr == (
        f"imagectl: {base} looks like qcow2: say --base-format qcow2 if the disk in it is the "
        "base, --base-format raw if the file is\n"
    )
    imagectl(*asked, "--base-format", "raw")
    info = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", overlay))
    assert (info["backing-filename"], info["backing-filename-format"]) == (str(base), "raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", overlay, flat)
    expected = bytearray(base.read_bytes())
    expected[3 * MIB : 3 * MIB + 64 * KIB] = b"\1" * 64 * KIB
    assert flat.read_bytes() == expected


def test_an_overlay_is_the_base_of_the_next(changed: str, home: Path, secret: Path):
    first, second = home / "first.qcow2", home / "second.qcow2"
    download = ("download", changed)
    imagectl(*download, first, "--incremental", "--base", secret)
    based = ("--incremental", "--base", first)
    assert "--base-format qcow2" in imagectl(*download, second, *based, status=5).stderr
    imagectl(*download, second, *based, "--base-format", "qcow2", "--verify")
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "qcow2", first, second)


def test_a_base_whose_own_format_would_be_guessed_is_refused(changed: str, home: Path, guest: Path):
    base = forget_format(based(home / "base.qcow2", guest, "raw"))
    asked = ("--incremental", "--base", base, "--base-format", "qcow2")
    said = imagectl("download", changed, home / "copy", *asked, status=5).stderr
    assert said == unrecorded(base, str(guest))
    assert not list(home.glob("copy*"))


def test_an_overlay_is_written_in_place_if_its_format_is_recorded(
    changed: str, home: Path, guest: Path
):
    file, flat, below = home / "file.qcow2", home / "flat.raw", guest.read_bytes()
    based(file, guest, "raw")
    imagectl("download", changed, file, "--incremental", "--format", "qcow2", "--verify")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", file, flat)
    expected = bytearray(below)
    expected[3 * MIB : 3 * MIB + 64 * KIB] = b"\1" * 64 * KIB
    assert (flat.read_bytes(), guest.read_bytes()) == (expected, below)
    before = forget_format(file).read_bytes()
    asked = ("--incremental", "--format", "qcow2")
    assert imagectl("download", changed, file, *asked, status=5).stderr == unrecorded(
        file, str(guest)
    )
    assert file.read_bytes() == before
    assert sorted(home.glob("file*")) == [file]


def test_the_format_of_no_base_is_refused(changed: str, home: Path):
    unused = imagectl("download", changed, home / "x", "--base-format", "raw", status=2).stderr
    assert "--base-format goes with --base." in unused
