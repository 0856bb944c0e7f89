# SPDX-License-Identifier: Apache-2.0
"""qcow2 files made of disks of chosen extents, against qemu-img; and any part of one."""

import itertools
import tempfile
import tracemalloc
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.core.errors import ImageChanged
from imageserver.core.extents import Extent
from imageserver.core.qcow2_layout import Layout
from tests.unit.core.test_qcow2_clusters import laid
from tests.unit.qcow2_disks import Disk, bytes_of, layout_of, map_of, qemu_img

KIB, MIB, PIB = 1 << 10, 1 << 20, 1 << 50
LENGTHS = st.one_of(
    st.integers(1, 20_000),
    st.integers(1, 40).map(lambda n: n * 64 * KIB),
    st.sampled_from([1, 511, 512, 4096, 2 * MIB, 3 * MIB + 1, 64 * MIB]),
)
#: Length, whether it was zero, whether it is now, whether it is dirty.
PARTS = st.lists(st.tuples(LENGTHS, st.booleans(), st.booleans(), st.booleans()), max_size=7)
CLUSTER_SIZES = st.sampled_from([4 * KIB, None, 2 * MIB])


def write(path: Path, disk: Disk, layout: Layout, *, overlay: bool = False) -> Path:
    path.write_bytes(bytes_of(disk, layout, overlay=overlay))
    return path


@settings(max_examples=6, deadline=None)
@given(parts=PARTS, cluster_size=CLUSTER_SIZES)
def test_qemu_reads_a_full_image_and_an_overlay_as_the_disk_is(
    parts: list[tuple[int, bool, bool, bool]], cluster_size: int | None
) -> None:
    before, after = [], []
    for length, was_zero, is_zero, dirty in parts:
        is_large = length > 4 * MIB
        was = was_zero or is_large, False
        before.append((length, *was))
        after.append((length, is_zero or is_large, True) if dirty else (length, *was))
    old, new = Disk(laid(before)), Disk(laid(after), seed=2)
    backing = {"backing": "full.qcow2", "backing_format": "qcow2"}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        full = write(home / "full.qcow2", old, layout_of(old, cluster_size))
        layout = layout_of(new, cluster_size, overlay=True, **backing)
        top = write(home / "top.qcow2", new, layout, overlay=True)
        new.write_raw(home / "disk.raw")

        qemu_img("check", full)
        qemu_img("check", top)
        qemu_img("compare", "-f", "raw", home / "disk.raw", top)
        assert allocated(top, layout) == expected(new, layout)
        qemu_img("rebase", "-b", "", top)
        qemu_img("compare", "-f", "raw", home / "disk.raw", top)


def allocated(path: Path, layout: Layout) -> dict[int, bool]:
    """Return the clusters by which an overlay hides its backing file, and which have data."""
    size = layout.shape.cluster_size
    return {
        cluster: e["data"]
        for e in map_of(path)
        for cluster in range(e["start"] // size, -(-(e["start"] + e["length"]) // size))
        if e["depth"] == 0
    }


def expected(disk: Disk, layout: Layout) -> dict[int, bool]:
    size = layout.shape.cluster_size
    states: dict[int, bool] = {}
    for start, length, _, dirty in disk.extents_:
        for cluster in range(start // size, -(-(start + length) // size)) if dirty else ():
            at = cluster * size
            inside = (e for e in disk.extents_ if e[0] < at + size and e[0] + e[1] > at)
            states[cluster] = any(not zero for _, _, zero, _ in inside)
    return states


@pytest.mark.parametrize("cluster_size", [None, 2 * MIB], ids=["64K", "2M"])
def test_a_pib_is_mapped(tmp_path: Path, cluster_size: int | None) -> None:
    """... at its beginning and its end."""
    data = [(MIB, MIB), (PIB - MIB, MIB)]
    disk = Disk(laid([(MIB, True, True), (MIB, False, True), (PIB - 3 * MIB, True, False)]))
    disk.extents_ = [*disk.extents_, (PIB - MIB, MIB, False, True)]
    path = write(tmp_path / "disk.qcow2", disk, layout_of(disk, cluster_size))

    qemu_img("check", path)
    if cluster_size:  # of small ones, qemu-img map looks at two million L2 tables
        size = cluster_size
        clusters = [(at // size * size, -(-(at + n) // size) * size) for at, n in data]
        found = [(e["start"], e["start"] + e["length"]) for e in map_of(path) if e["data"]]
        assert found == clusters


@pytest.mark.parametrize("cluster_size", [4 * KIB, 64 * KIB])
def test_any_part_is_the_same_as_of_the_whole(cluster_size: int) -> None:
    parts = [(100_000, False, True), (5 * MIB, True, False), (3 * MIB + 77, False, False)]
    disk = Disk(laid([*parts, (40 * KIB, True, True), (10 * KIB, False, True)]))
    layout = layout_of(disk, cluster_size)
    whole = bytes_of(disk, layout)

    edges = [layout.body, *(layout.offset(n) for n in range(layout.count)), layout.length]
    cuts = sorted({0, 1, cluster_size, *edges, *(at + cluster_size for at in edges[:-1])})
    for start, stop in itertools.pairwise(cuts):
        if start < stop - 2:
            assert bytes_of(disk, layout, start + 1, stop - 1) == whole[start + 1 : stop - 1]
            assert bytes_of(disk, layout, start, stop) == whole[start:stop]
    assert bytes_of(disk, layout, 5, layout.length - 5) == whole[5:-5]


def test_of_a_part_only_what_is_in_it_is_looked_at_and_read() -> None:
    looked: list[tuple[int, int]] = []
    disk = Disk(laid([(1200 * MIB, False, False)]))
    layout = layout_of(disk)
    disk.on_extents = lambda *span: looked.append(span)
    at = layout.offset(1) + 64 * KIB
    bytes_of(disk, layout, at + 10, at + 30)

    assert disk.reads == [(512 * MIB + 10, 512 * MIB + 30)]
    assert looked == [(512 * MIB, 1024 * MIB)]


def test_data_on_both_sides_of_a_short_gap_is_read_at_once() -> None:
    disk = Disk(laid([(4096, n % 2 == 1, False) for n in range(9)]))
    layout = layout_of(disk, 4096)
    bytes_of(disk, layout)

    assert disk.reads == [(0, 9 * 4096)]


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param([(64 * KIB, True, False), (64 * KIB, False, False)], id="as-many-clusters"),
        pytest.param([(128 * KIB, False, False)], id="more"),
        pytest.param([(128 * KIB, True, False)], id="none"),
    ],
)
def test_extents_that_change_meanwhile_end_the_stream(
    changed: list[tuple[int, bool, bool]],
) -> None:
    disk = Disk(laid([(64 * KIB, False, False), (64 * KIB, True, False)]))
    layout = layout_of(disk)
    disk.extents_ = laid(changed)

    with pytest.raises(ImageChanged):
        bytes_of(disk, layout)


def test_another_layout_has_another_digest() -> None:
    disks = [
        [(64 * KIB, False, False), (64 * KIB, True, False)],
        [(64 * KIB, True, False), (64 * KIB, False, False)],
        [(64 * KIB, False, False), (64 * KIB + 1, True, False)],
    ]
    layouts = [layout_of(Disk(laid(disk)), size) for disk in disks for size in (4 * KIB, None)]

    assert len({layout.digest() for layout in layouts}) == len(layouts)
    again = layout_of(Disk(laid([(1000, False, False), (127 * KIB + 24, True, False)])))
    assert again.digest() == layouts[1].digest(), "the same clusters: the same file"


class Fragmented:
    """A disk of two million extents, every other one data, which are made when asked for."""

    size = 2_000_000 * 64 * KIB

    def __init__(self) -> None:
        self.on_batch: Callable[[int], None] = lambda _: None

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        assert not dirty
        for first in range(start, stop, 64 * MIB):
            self.on_batch(first)
            steps = range(first, min(first + 64 * MIB, stop), 64 * KIB)
            yield [(at, 64 * KIB, at // (64 * KIB) % 2 == 1, False) for at in steps]

    def read_spans(self, spans: list[tuple[int, int]]) -> Generator[memoryview]:
        for start, stop in spans:
            yield memoryview(bytes(stop - start))

    def close(self) -> None: ...


def test_memory_does_not_depend_on_the_number_of_extents() -> None:
    disk, grown = Fragmented(), 0

    def look(at: int) -> None:  # at a tenth of them: tracing makes all slow
        nonlocal grown
        if at == 1000 * 64 * MIB:
            tracemalloc.start()
        elif at == 1100 * 64 * MIB:
            grown, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()

    disk.on_batch = look
    layout = layout_of(disk)
    assert 0 < grown < 256 * KIB, "of 100,000 extents, no more than those of one answer are kept"

    at = layout.offset(layout.count // 2)
    tracemalloc.start()
    try:
        bytes_of(disk, layout, at, at + MIB)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * MIB
