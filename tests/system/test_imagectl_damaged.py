# SPDX-License-Identifier: Apache-2.0
"""imagectl and qcow2 images of which something is missing: none is taken for zeros."""

import os
from pathlib import Path

import pytest

from tests.system.harness import Server, qemu_img, qemu_nbd
from tests.system.lying import OLD, SIZE, Liar, extents
from tests.system.moving import filled, imagectl, offer, offer_file


def converted(raw: Path, *options: object) -> Path:
    image = raw.with_suffix(".qcow2")
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, image)
    return image


def halved(image: Path) -> Path:
    os.truncate(image, image.stat().st_size // 2)
    return image


@pytest.fixture
def image(home: Path) -> Path:
    return converted(filled(home / "source.raw", SIZE, (0, SIZE)))


def overlay(base: Path, kind: str) -> Path:
    top = base.with_name("top.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", kind, top)
    return top


def test_half_an_image_is_not_uploaded_but_by_force(server: Server, home: Path, image: Path):
    halved(image)
    disk = filled(home / "disk.raw", SIZE, (0, SIZE))
    before = disk.read_bytes()
    with qemu_nbd(disk) as sock:
        asked = ("upload", image, offer(server, sock), "--format", "qcow2", "--verify")
        said = imagectl(*asked, status=5).stderr
        assert said.startswith(f"imagectl: {image} is damaged: qemu-img check finds ")
        assert said.endswith("; --force takes what QEMU reads of it\n")
        assert disk.read_bytes() == before
        imagectl(*asked, "--force")
    assert disk.read_bytes() != before


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_an_image_whose_base_is_cut_is_not_uploaded(
    server: Server, home: Path, image: Path, kind: str
):
    base = image if kind == "qcow2" else home / "source.raw"
    top, disk = overlay(base, kind), home / "disk.raw"
    url = offer_file(server, disk)
    asked = ("upload", top, url, "--format", "qcow2", "--backing")
    halved(base)
    said = imagectl(*asked, status=5).stderr
    assert said.startswith(f"imagectl: {base} ")
    assert not disk.exists()
    imagectl(*asked, "--force")
    assert disk.stat().st_size == SIZE


@pytest.mark.parametrize("way", ["in place", "base"])
def test_nothing_is_added_to_an_image_that_is_damaged(serve, home: Path, image: Path, way: str):
    liar: Liar = serve(OLD, (0, SIZE // 4), dirty=True)
    halved(image)
    before = image.read_bytes()
    where = [image] if way == "in place" else [home / "copy", "--base", image]
    form = "--format" if way == "in place" else "--base-format"
    asked = ("download", liar.url, *where, "--incremental", form, "qcow2", "--force")
    said = imagectl(*asked, status=5).stderr
    assert said.startswith(f"imagectl: {image} is damaged: qemu-img check finds ")
    assert image.read_bytes() == before
    assert not list(home.glob("copy*"))


def test_a_part_that_is_damaged_begins_anew(serve, home: Path):
    liar: Liar = serve(OLD)
    copy, part = home / "copy", home / "copy.part"
    liar.only(SIZE // 2)
    asked = ("download", liar.url, copy, "--format", "qcow2", "-n", 1)
    imagectl(*asked, "--patience", 0, status=1)
    liar.only(1 << 40)
    halved(part)
    assert imagectl(*asked).stderr == f"{part} is not as it was left: starting again.\n"
    assert "identical" in qemu_img(
        "compare", "-f", "raw", "-F", "qcow2", _written(home / "old", OLD), copy
    )


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [1, 1000, 65537])
@pytest.mark.parametrize("way", ["full", "incremental"])
def test_an_image_of_no_whole_sectors_is_restored_as_it_was(
    server: Server, serve, home: Path, size: int, way: str
):
    """As a file, which could have another size afterwards; of others, the unit tests tell."""
    copy, target = home / "copy", filled(home / "target.raw", size, (0, size))
    liar: Liar = serve(OLD[:size])
    if way == "full":
        imagectl("download", liar.url, copy, "--format", "qcow2")
    else:
        base = _written(home / "base", bytes(size))
        liar.extents = extents((0, size), size=size, dirty=True)
        imagectl("download", liar.url, copy, "--incremental", "--base", base)
    asked = ("--format", "qcow2", "--backing", "--verify")
    imagectl("upload", copy, offer_file(server, target), *asked)
    assert target.read_bytes() == OLD[:size]
