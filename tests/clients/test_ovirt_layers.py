# SPDX-License-Identifier: Apache-2.0
"""One layer of two: oVirt's client downloads it from an export as oVirt makes it."""

import contextlib
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from ovirt_imageio import client
from ovirt_imageio._internal import nbd, qemu_nbd

from tests.clients.ovirt import LEAVES_A_CONNECTION, collected  # noqa: F401 - fixture
from tests.system.harness import Server, qemu_img, qemu_io

K, M = 1 << 10, 1 << 20
SIZE = 8 * M

pytestmark = LEAVES_A_CONNECTION


@pytest.fixture(scope="module")
def layers(workplace: Path) -> tuple[Path, Path]:
    """The lower is data everywhere but at 6M; the upper hides some of it by data, some by zeros."""
    lower, upper = workplace / "lower.qcow2", workplace / "upper.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", lower, SIZE)
    qemu_io(lower, "qcow2", "write -P 1 0 6M", "write -P 2 7M 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", lower, "-F", "qcow2", upper)
    qemu_io(upper, "qcow2", "write -P 3 1M 64k", "write -z 2M 1M", "write -z 6M 128k")
    qemu_io(upper, "qcow2", "write -P 4 2560k 64k", f"write -P 5 {SIZE - 64 * K} 64k")
    return lower, upper


@contextlib.contextmanager
def exported(server: Server, layers: tuple[Path, Path], *, chain: bool) -> Iterator[str]:
    """Export the upper layer, alone or with what it is based on, as oVirt does; yield its URL."""
    sock = nbd.UnixAddress(str(server.directory / "layer.sock"))
    options: dict[str, Any] = {"read_only": True, "shared": 8, "backing_chain": chain}
    with qemu_nbd.run(str(layers[1]), "qcow2", sock, **options):
        path = server.add("layer", socket=sock.path, read_only=True)
        yield f"http://localhost:{server.port}{path}"


def qemu_name(layers: tuple[Path, Path], *, chain: bool) -> str:
    """Return what qemu-img reads as the upper layer, alone or with what it is based on."""
    alone = {} if chain else {"backing": None}
    file = {"driver": "file", "filename": str(layers[1])}
    return "json:" + json.dumps({"driver": "qcow2", "file": file} | alone)


def mapped(image: Path | str, *, depth: int | None = None) -> list[tuple[int, int, bool, bool]]:
    """Return (start, length, zero, hole) as qemu-img sees it; ``depth``: of one layer only."""
    extents = json.loads(qemu_img("map", "-U", "--output=json", image))
    for e in extents:
        if depth not in {None, e["depth"]}:
            e |= {"zero": True, "present": False}
    runs = groupby(extents, key=lambda e: (e["zero"], not e["present"]))
    found = []
    for (zero, hole), run in runs:
        lengths = [e["length"] for e in run]
        start = sum(found[-1][:2]) if found else 0
        found.append((start, sum(lengths), zero, hole))
    return found


@pytest.mark.parametrize("chain", [False, True], ids=["layer", "chain"])
def test_extents_say_what_a_layer_or_a_chain_has(server, layers, chain):
    with exported(server, layers, chain=chain) as url, client.ImageioClient(url, None) as image:
        found = [(e.start, e.length, e.zero, e.hole) for e in image.extents()]
    assert found == mapped(qemu_name(layers, chain=chain))
    assert {extent[2:] for extent in found} == {(False, False), (True, False), (True, True)}


def test_a_layer_is_downloaded_as_qcow2_upon_the_one_below(server, layers, tmp_path):
    copy, (lower, upper) = tmp_path / "copy.qcow2", layers
    with exported(server, layers, chain=False) as url:
        below = {"backing_file": str(lower), "backing_format": "qcow2"}
        client.download(url, str(copy), None, fmt="qcow2", max_workers=4, **below)
    assert mapped(copy, depth=0) == mapped(upper, depth=0)
    assert qemu_img("compare", copy, upper).strip() == "Images are identical."


def test_a_layer_is_downloaded_as_raw(server, layers, tmp_path):
    copy = tmp_path / "copy.raw"
    with exported(server, layers, chain=False) as url:
        client.download(url, str(copy), None, fmt="raw", max_workers=4)
    compared = qemu_img("compare", "-f", "raw", copy, qemu_name(layers, chain=False))
    assert compared.strip() == "Images are identical."
