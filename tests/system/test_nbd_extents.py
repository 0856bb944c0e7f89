# SPDX-License-Identifier: Apache-2.0
"""GET extents of NBD images (docs/api.md), against what nbdinfo and qemu-img say."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.system.answers import COMMON, assert_only_common_fields
from tests.system.harness import (
    Server,
    exchange,
    nbdkit,
    program,
    qemu_img,
    qemu_io,
    qemu_nbd,
    repeatable,
    wait_until,
)

K, M, G, T = 1 << 10, 1 << 20, 1 << 30, 1 << 40
Extents = list[dict[str, Any]]


def make_qcow2(path: Path, size: int, *commands: str, bitmap: str = "", cluster: int = 64 * K):
    """Create a qcow2 image, add a bitmap, then write."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, size)
    if bitmap:
        qemu_img("bitmap", "--add", "--granularity", "64k", path, bitmap)
    if commands:
        qemu_io(path, "qcow2", *commands)


def get(server: Server, sock: Path, query: str = "", **fields: object) -> Extents:
    """Ask for extents; the answer is complete and covers the image as the contract says."""
    path = server.add("image", socket=str(sock), **fields)
    answer = server.request("GET", path + "/extents" + query)
    assert (answer.status, answer.fields | COMMON) == (200, answer.fields)
    extents: Extents = answer.json
    assert extents[0]["start"] == 0
    for left, right in pairwise(extents):
        assert left["start"] + left["length"] == right["start"], "a gap or an overlap"
        assert flags(left) != flags(right), "neighbours that agree are not merged"
    compact = json.dumps(extents, separators=(",", ":")).encode()
    assert answer.body == compact
    return extents


def flags(extent: dict[str, Any]) -> dict[str, Any]:
    return {name: extent[name] for name in extent if name not in {"start", "length"}}


# The oracle


def nbd_map(sock: Path, context: str, export: str = "") -> list[tuple[int, int, int]]:
    """Return what nbdinfo says of a context: (start, stop, flags)."""
    command = [
        program("nbdinfo"),
        "--json",
        f"--map={context}",
        f"nbd+unix:///{export}?socket={sock}",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [(e["offset"], e["offset"] + e["length"], e["type"]) for e in json.loads(done.stdout)]


def merged(pieces: Iterator[tuple[int, int, dict[str, bool]]]) -> Extents:
    """Write (start, stop, flags) as the contract does."""
    runs = [list(run) for _, run in groupby(pieces, key=lambda piece: piece[2])]
    return [{"start": run[0][0], "length": run[-1][1] - run[0][0]} | run[0][2] for run in runs]


def allocation(sock: Path, export: str = "", **more: bool) -> Extents:
    return merged(
        (start, stop, more | {"zero": bits & 3 != 0})
        for start, stop, bits in nbd_map(sock, "base:allocation", export)
    )


def union(sock: Path, bitmap: str) -> Extents:
    """Return both contexts' extents, cut at the boundaries of either."""
    states = nbd_map(sock, "base:allocation")
    dirties = nbd_map(sock, f"qemu:dirty-bitmap:{bitmap}")
    cuts = sorted({at for extent in states + dirties for at in extent[:2]})

    def pieces() -> Iterator[tuple[int, int, dict[str, bool]]]:
        for start, stop in pairwise(cuts):
            dirty = next(bits for low, high, bits in dirties if low <= start < high)
            state = next(bits for low, high, bits in states if low <= start < high)
            yield start, stop, {"dirty": dirty & 1 != 0, "zero": state & 3 != 0}

    return merged(pieces())


# Allocation

MIXED = ("write -P 7 0 192k", "write -z 64k 64k", "write -P 5 3M 64k", "write -z 5M 1M")


@pytest.mark.parametrize("query", ["", "?context=zero"], ids=["default", "zero"])
def test_holes_and_zero_clusters_are_zero_and_the_rest_is_not(
    server: Server, tmp_path: Path, workplace: Path, query: str
):
    image = tmp_path / "mixed.qcow2"
    make_qcow2(image, 8 * M, *MIXED)
    with qemu_nbd(image, fmt="qcow2", export="vda", sock=workplace / "mixed.sock") as sock:
        extents = get(server, sock, query, export="vda")
        assert extents == [
            {"start": 0, "length": 64 * K, "zero": False},
            {"start": 64 * K, "length": 64 * K, "zero": True},
            {"start": 128 * K, "length": 64 * K, "zero": False},
            {"start": 192 * K, "length": 3 * M - 192 * K, "zero": True},
            {"start": 3 * M, "length": 64 * K, "zero": False},
            {"start": 3 * M + 64 * K, "length": 5 * M - 64 * K, "zero": True},
        ]
        assert extents == allocation(sock, "vda")


def test_a_sparse_raw_image_shows_its_holes(server: Server, tmp_path: Path, workplace: Path):
    image = tmp_path / "sparse.raw"
    with image.open("wb") as file:
        file.truncate(16 * M)
        for at in (0, 5 * M, 16 * M - 64 * K):
            file.seek(at)
            file.write(b"x" * 64 * K)
    with qemu_nbd(image, sock=workplace / "sparse.sock") as sock:
        extents = get(server, sock)
        assert [e["zero"] for e in extents] == [False, True, False, True, False]
        assert extents == allocation(sock)


def test_a_thousand_random_extents_are_those_of_the_oracles(
    server: Server, tmp_path: Path, workplace: Path
):
    image, rng = tmp_path / "random.qcow2", repeatable("extents")
    commands = [
        f"write {rng.choice(['-P 1', '-P 2', '-z'])} {rng.randrange(8000) * 4}k 4k"
        for _ in range(2000)
    ]
    make_qcow2(image, 32 * M, *commands, cluster=4 * K)
    mapped = json.loads(qemu_img("map", "--output=json", "-f", "qcow2", image))
    with qemu_nbd(image, fmt="qcow2", sock=workplace / "random.sock") as sock:
        extents = get(server, sock)
        assert len(extents) > 1000
        assert extents == allocation(sock)
        assert extents == merged(
            (e["start"], e["start"] + e["length"], {"zero": e["zero"]}) for e in mapped
        )


def test_extents_go_beyond_what_one_request_may_ask_for(
    server: Server, tmp_path: Path, workplace: Path
):
    image = tmp_path / "large.qcow2"
    make_qcow2(image, 10 * T, "write -P 1 5G 64k", f"write -P 1 {10 * T - 64 * K} 64k")
    with qemu_nbd(image, fmt="qcow2", sock=workplace / "large.sock") as sock:
        assert get(server, sock) == [
            {"start": 0, "length": 5 * G, "zero": True},
            {"start": 5 * G, "length": 64 * K, "zero": False},
            {"start": 5 * G + 64 * K, "length": 10 * T - 5 * G - 128 * K, "zero": True},
            {"start": 10 * T - 64 * K, "length": 64 * K, "zero": False},
        ]


@pytest.mark.parametrize("size", [512, 4 * G - 512, 4 * G, 4 * G + 512])
def test_an_image_of_one_kind_is_one_extent(server: Server, workplace: Path, size: int):
    with nbdkit(workplace / "one.sock", "memory", str(size)) as sock:
        assert get(server, sock) == [{"start": 0, "length": size, "zero": True}]


@pytest.mark.parametrize("query", ["", "?context=zero", "?context=dirty"])
def test_an_empty_image_has_no_extents(server: Server, workplace: Path, query: str):
    with nbdkit(workplace / "empty.sock", "memory", "0") as sock:
        path = server.add("empty", socket=str(sock), export_bitmap="b0")
        answer = server.request("GET", path + "/extents" + query)
        assert (answer.status, answer.body) == (200, b"[]")


@pytest.mark.parametrize("query", ["", "?context=zero"], ids=["default", "zero"])
def test_a_server_without_block_status_is_one_extent_of_data(
    server: Server, workplace: Path, query: str
):
    with nbdkit(workplace / "nostatus.sock", "--filter=noextents", "memory", "10G") as sock:
        assert get(server, sock, query) == [{"start": 0, "length": 10 * G, "zero": False}]
        assert get(server, sock, "?context=dirty", export_bitmap="b0") == [
            {"start": 0, "length": 10 * G, "dirty": True, "zero": False}
        ]


# Dirty


@pytest.fixture(scope="module")
def tracked(workplace: Path) -> Iterator[Path]:
    """A disk with a bitmap that has seen some writes, another that has seen none."""
    image = workplace / "tracked.qcow2"
    make_qcow2(image, 8 * M, *MIXED)
    for bitmap in ("b0", "clean"):
        qemu_img("bitmap", "--add", image, bitmap)
    qemu_img("bitmap", "--disable", image, "clean")
    qemu_io(image, "qcow2", "write -P 9 64k 128k", "write -P 9 4M 1k", "write -z 3M 64k")
    with qemu_nbd(image, "--bitmap=b0", "--bitmap=clean", fmt="qcow2") as sock:
        yield sock


def test_dirty_extents_are_the_union_of_bitmap_and_allocation(server: Server, tracked: Path):
    extents = get(server, tracked, "?context=dirty", export_bitmap="b0")
    assert extents[:5] == [
        {"start": 0, "length": 64 * K, "dirty": False, "zero": False},
        {"start": 64 * K, "length": 128 * K, "dirty": True, "zero": False},
        {"start": 192 * K, "length": 3 * M - 192 * K, "dirty": False, "zero": True},
        {"start": 3 * M, "length": 64 * K, "dirty": True, "zero": True},
        {"start": 3 * M + 64 * K, "length": M - 64 * K, "dirty": False, "zero": True},
    ]
    assert extents == union(tracked, "b0")


def test_a_clean_bitmap_says_that_nothing_is_dirty(server: Server, tracked: Path):
    extents = get(server, tracked, "?context=dirty", export_bitmap="clean")
    assert extents == allocation(tracked, dirty=False)
    assert not any(extent["dirty"] for extent in extents)


@pytest.mark.parametrize("bitmap", [None, "", "missing", "b", "b0 "], ids=repr)
def test_without_its_bitmap_everything_is_dirty(server: Server, tracked: Path, bitmap: str | None):
    extents = get(server, tracked, "?context=dirty", export_bitmap=bitmap)
    assert extents == allocation(tracked, dirty=True)


@pytest.mark.parametrize("idle", [True, False], ids=["another-connection", "a-kept-one"])
def test_dirty_extents_say_which_bitmap_they_rest_on(server: Server, tracked: Path, idle: bool):
    def said(bitmap: str | None, query: str = "?context=dirty") -> str | None:
        path = server.add("image", socket=str(tracked), export_bitmap=bitmap)
        if not idle:
            assert server.request("GET", path, headers={"Range": "bytes=0-0"}).status == 206
        return server.request("GET", path + "/extents" + query).fields.get("image-dirty-bitmap")

    before = server.log.count("no dirty bitmap: all counts as dirty transfer=image")
    assert [said(name) for name in ("b0", "clean", "missing", None)] == [
        "b0",
        "clean",
        "none",
        "none",
    ]
    assert said("b0", "?context=dirty&start=4096") == "b0"
    assert said("b0", "") is None
    warned = server.log.count("no dirty bitmap: all counts as dirty transfer=image")
    assert warned == before + 2


def test_the_zero_context_does_not_look_at_the_bitmap(server: Server, tracked: Path):
    assert get(server, tracked, "?context=zero", export_bitmap="b0") == allocation(tracked)


def test_what_is_written_through_the_server_becomes_dirty(
    server: Server, tmp_path: Path, workplace: Path
):
    image = tmp_path / "live.qcow2"
    make_qcow2(image, 4 * M, bitmap="b0")
    with qemu_nbd(image, "--bitmap=b0", fmt="qcow2", sock=workplace / "live.sock") as sock:
        assert get(server, sock, "?context=dirty", export_bitmap="b0") == [
            {"start": 0, "length": 4 * M, "dirty": False, "zero": True}
        ]
        written = {"Range": f"bytes={M}-{M + 64 * K - 1}"}
        assert server.request("PATCH", "/images/image", b"x" * 64 * K, written).status == 200
        assert get(server, sock, "?context=dirty", export_bitmap="b0") == [
            {"start": 0, "length": M, "dirty": False, "zero": True},
            {"start": M, "length": 64 * K, "dirty": True, "zero": False},
            {"start": M + 64 * K, "length": 3 * M - 64 * K, "dirty": False, "zero": True},
        ]


def test_random_dirty_extents_are_those_of_the_oracle(
    server: Server, tmp_path: Path, workplace: Path
):
    image, rng = tmp_path / "dirty.qcow2", repeatable("dirty")
    fill = [f"write -P 1 {rng.randrange(8000) * 4}k 4k" for _ in range(1000)]
    make_qcow2(image, 32 * M, *fill, cluster=4 * K)
    qemu_img("bitmap", "--add", "--granularity", "4k", image, "b0")
    writes = (rng.choice(["-P 2", "-z"]) for _ in range(500))
    qemu_io(image, "qcow2", *(f"write {w} {rng.randrange(8000) * 4}k 4k" for w in writes))
    with qemu_nbd(image, "--bitmap=b0", fmt="qcow2", sock=workplace / "dirty.sock") as sock:
        extents = get(server, sock, "?context=dirty", export_bitmap="b0")
        assert len(extents) > 1000
        assert extents == union(sock, "b0")


# Refusals


@pytest.mark.parametrize(
    "query",
    [
        "?context=",
        "?context=Zero",
        "?context=allocation",
        "?context=dirty%20",
        "?context=zero,dirty",
    ],
)
def test_any_other_context_is_refused(server: Server, tracked: Path, query: str):
    path = server.add("image", socket=str(tracked))
    answer = server.request("GET", path + "/extents" + query)
    assert (answer.status, list(answer.json)) == (400, ["error"])
    assert_only_common_fields(answer)


def test_extents_can_be_asked_for_again_at_once_on_one_connection(server: Server, tracked: Path):
    path = server.add("image", socket=str(tracked), export_bitmap="b0")
    with contextlib.closing(server.connect()) as connection:
        answers = [exchange(connection, "GET", path + "/extents/") for _ in range(50)]
    assert {(answer.status, answer.body) for answer in answers} == {(200, answers[0].body)}


def test_a_client_that_has_gone_keeps_the_image_no_longer(server: Server, workplace: Path):
    """A walk of 256 steps, a tenth of a second each, that finds nothing to write."""
    options = ("--filter=delay", "memory", "size=1T", "delay-extents=100ms")
    with nbdkit(workplace / "slow.sock", *options) as sock:
        path = server.add("slow", socket=str(sock))
        with server.raw(f"GET {path}/extents HTTP/1.1\r\nHost: x\r\n\r\n".encode()) as client:
            assert client.recv(12) == b"HTTP/1.1 200"
            assert server.request("POST", f"{path}/flush").status == 409
        wait_until(lambda: server.request("POST", f"{path}/flush").status == 200, 8)
