# SPDX-License-Identifier: Apache-2.0
"""imagectl against oVirt's own daemon: what arrives is the same, holes included."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.ovirt import OvirtDaemon, ovirt_daemon

from tests.system.harness import qemu_img, qemu_io, qemu_nbd
from tests.system.moving import IMAGES, KIB, MIB, assert_same, filled, imagectl


@pytest.fixture(scope="module")
def daemon(workplace: Path) -> Iterator[OvirtDaemon]:
    with ovirt_daemon(workplace / "ovirt") as running:
        yield running


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, home: Path) -> Path:
    return IMAGES[request.param](home / f"{request.param}.raw")


def test_an_nbd_image_arrives_as_it_is(daemon: OvirtDaemon, image: Path, home: Path):
    with qemu_nbd(image, "--read-only") as sock:
        url = daemon.add_nbd(sock, image.stat().st_size, ops=["read"])
        imagectl("download", url, home / "copy.raw", "--connections", 4)
    assert_same(image, home / "copy.raw")


def test_a_file_arrives_as_it_is(daemon: OvirtDaemon, home: Path):
    # The daemon calls all of a file data, so the zeros are found on the way.
    image = filled(home / "disk.raw", 40 * MIB, (0, MIB), (20 * MIB, 24 * MIB))
    imagectl("download", daemon.add_file(image), home / "copy.raw", "--connections", 4)
    assert_same(image, home / "copy.raw")


@pytest.mark.parametrize("size", [0, 1, 1_000_003])
def test_a_file_of_any_size_arrives(daemon: OvirtDaemon, home: Path, size: int):
    image = filled(home / "disk.raw", size, (size // 2, size))
    imagectl("download", daemon.add_file(image), home / "copy.raw")
    assert_same(image, home / "copy.raw")


def test_an_image_replaces_an_nbd_image(daemon: OvirtDaemon, image: Path, home: Path):
    size = image.stat().st_size
    old = filled(home / "old.raw", size, (0, min(size, 32 * MIB)))
    with qemu_nbd(old, "--discard=unmap") as sock:
        imagectl("upload", image, daemon.add_nbd(sock, size), "--connections", 4)
    # Holes of less than 64 KiB go up as zeros.
    assert_same(image, old, holes=image.stem not in {"fragmented", "sectors"})


def test_an_image_replaces_a_file(daemon: OvirtDaemon, home: Path):
    image = filled(home / "disk.raw", 40 * MIB, (0, MIB), (20 * MIB, 24 * MIB))
    old = filled(home / "old.raw", 40 * MIB, (0, 40 * MIB))
    imagectl("upload", image, daemon.add_file(old), "--connections", 4)
    assert_same(image, old)


@pytest.mark.parametrize("size", [512, 1_000_448])
def test_a_file_of_odd_size_is_replaced(daemon: OvirtDaemon, home: Path, size: int):
    image = filled(home / "disk.raw", size, (size // 2, size))
    old = filled(home / "old.raw", size, (0, size))
    imagectl("upload", image, daemon.add_file(old))
    assert_same(image, old, holes=False)  # the daemon writes zeros into a file's partial blocks


def test_qcow2_goes_up_and_comes_down_as_a_guest_sees_it(daemon: OvirtDaemon, home: Path):
    raw = filled(home / "disk.raw", 64 * MIB, (MIB, 3 * MIB), (40 * MIB, 41 * MIB))
    image, target, copy = home / "disk.qcow2", home / "target.qcow2", home / "copy.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    qemu_img("create", "-f", "qcow2", target, 64 * MIB)
    with qemu_nbd(target, "--discard=unmap", fmt="qcow2") as sock:
        url = daemon.add_nbd(sock, 64 * MIB)
        imagectl("upload", image, url, "--format", "qcow2")
        imagectl("download", url, copy, "--format", "qcow2")
    for other in (target, copy):
        assert "identical" in qemu_img("compare", "-f", "raw", "-F", "qcow2", raw, other)
        assert other.stat().st_size < 8 * MIB


def test_only_what_has_changed_is_fetched_onto_a_base(daemon: OvirtDaemon, home: Path):
    disk, base = home / "disk.qcow2", home / "base.raw"
    filled(base, 16 * MIB, (0, 16 * MIB))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", base, disk)
    qemu_img("bitmap", "--add", disk, "backup0")
    qemu_io(disk, "qcow2", "write -P 7 2M 192k", "write -z 5M 128k")
    with qemu_nbd(disk, "--read-only", "--bitmap=backup0", fmt="qcow2") as sock:
        url = daemon.add_nbd(sock, 16 * MIB, dirty=True)
        imagectl("download", url, base, "--incremental")
    assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", disk, base)


def test_the_unix_socket_of_the_daemon_serves_too(daemon: OvirtDaemon, home: Path):
    image = filled(home / "disk.raw", MIB, (0, MIB))
    url = daemon.add_file(image)
    imagectl("download", url, home / "copy.raw", "--unix-socket", daemon.local)
    assert_same(image, home / "copy.raw")


def test_what_is_verified_holds(daemon: OvirtDaemon, home: Path):
    image = IMAGES["sparse"](home / "disk.raw")
    target = filled(home / "target.raw", image.stat().st_size)
    with qemu_nbd(target, "--discard=unmap") as sock:
        url = daemon.add_nbd(sock, image.stat().st_size)
        imagectl("upload", image, url, "--verify")
        imagectl("download", url, home / "copy.raw", "--verify")
    assert_same(image, home / "copy.raw")


def test_an_unknown_ticket_is_refused_in_one_sentence(daemon: OvirtDaemon, home: Path):
    url = f"http://127.0.0.1:{daemon.port}/images/nobody"
    errors = imagectl("download", url, home / "copy.raw", status=3).stderr
    assert errors.startswith("imagectl: ")
    assert errors.count("\n") == 1
    assert list(home.iterdir()) == []


def test_the_map_is_the_daemons(daemon: OvirtDaemon, home: Path):
    image = filled(home / "disk.raw", 4 * MIB, (MIB, MIB + 64 * KIB))
    with qemu_nbd(image) as sock:
        url = daemon.add_nbd(sock, 4 * MIB)
        shown = json.loads(imagectl("map", url, "--json").stdout)
    assert shown["totals"] == {"data": 64 * KIB, "zero": 4 * MIB - 64 * KIB}
    assert [extent["start"] for extent in shown["extents"]] == [0, MIB, MIB + 64 * KIB]


def test_what_the_daemon_announces_holds(daemon: OvirtDaemon, home: Path):
    image = filled(home / "disk.raw", 4 * MIB, (0, MIB))
    before = image.read_bytes()
    with qemu_nbd(image, "--discard=unmap") as sock:
        url = daemon.add_nbd(sock, 4 * MIB)
        shown = json.loads(imagectl("info", url, "--json").stdout)
        assert shown["size"] == 4 * MIB
        imagectl("check", url, "--write")
    assert image.read_bytes() == before


def looked_at(url: str) -> tuple[int, dict[str, int], set[str]]:
    """Look at an image in every way; return its size, its totals and which checks held."""
    shown = json.loads(imagectl("map", "--json", url).stdout)
    assert f"({shown['size']} bytes), {shown['count']} extent" in imagectl("map", url).stdout
    facts = json.loads(imagectl("info", "--extents", "--json", url).stdout)
    count = {"count": shown["count"]}
    assert (facts["size"], facts["extents"]) == (shown["size"], count | shown["totals"])
    checks = json.loads(imagectl("check", "--write", "--json", url).stdout)["checks"]
    held = {check["check"] for check in checks if check["verdict"] == "ok"}
    return shown["size"], shown["totals"], held


def test_a_file_can_be_looked_at(daemon: OvirtDaemon, home: Path):
    image = filled(home / "disk.raw", 1_000_448, (0, MIB // 2))
    before = image.read_bytes()
    # The daemon calls all of a file data.
    size, totals, held = looked_at(daemon.add_file(image))
    assert (size, totals) == (1_000_448, {"data": 1_000_448, "zero": 0})
    assert {"first and last bytes", "extents", "write at the end", "write inside"} <= held
    assert image.read_bytes() == before


@pytest.mark.parametrize("options", [{}, {"dirty": True}], ids=["plain", "dirty"])
def test_an_empty_image_can_be_looked_at(daemon: OvirtDaemon, home: Path, options: dict[str, bool]):
    # Asked for its extents, the daemon fails, or tells one of no bytes.
    image = filled(home / "empty.raw", 0)
    with qemu_nbd(image) as sock:
        for url in (daemon.add_nbd(sock, 0, **options), daemon.add_file(image, **options)):
            size, totals, held = looked_at(url)
            assert (size, totals) == (0, {"data": 0, "zero": 0})
            assert {"OPTIONS", "range beyond the end", "flush"} <= held
