# SPDX-License-Identifier: Apache-2.0
"""Which qcow2 files there can be, and that what is kept of one is little."""

import struct
import tracemalloc
from collections.abc import Iterator

import pytest

from imageserver.core.errors import BadRequest
from imageserver.core.qcow2_clusters import Run
from imageserver.core.qcow2_layout import Layout, Shape, Survey, shaped

KIB, GIB, TIB, PIB, EIB = (1 << bits for bits in (10, 30, 40, 50, 60))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(0, 64 * KIB, id="empty"),
        pytest.param(2 * PIB, 64 * KIB, id="largest-of-the-default"),
        pytest.param(2 * PIB + 1, 128 * KIB, id="larger"),
        pytest.param(2 * EIB, 2048 * KIB, id="largest"),
    ],
)
def test_clusters_are_of_64_kib_or_the_least_that_the_l1_table_can_map(
    size: int, expected: int
) -> None:
    assert shaped(size, None, None, None).cluster_size == expected


@pytest.mark.parametrize(
    ("size", "cluster_size", "message"),
    [
        (
            8 * TIB + 1,
            4096,
            '"cluster_size" must be at least 8192 for an image of 8796093022209 bytes',
        ),
        (2 * EIB + 1, None, "the image is too large for qcow2"),
    ],
)
def test_what_qemu_would_not_open_is_refused(
    size: int, cluster_size: int | None, message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        shaped(size, cluster_size, None, None)


def test_more_data_than_the_refcount_table_can_count_is_refused() -> None:
    shape = shaped(8 * TIB, 4096, None, None)
    survey = Survey(shape.group_bits)
    survey.clusters = 8 * TIB // 4096
    with pytest.raises(BadRequest, match='"cluster_size" must be more than 4096 for so much data'):
        Layout(shape, survey)


def test_the_virtual_size_is_whole_sectors() -> None:
    assert [Shape(size, 16).virtual_size for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_the_header_is_of_version_3_without_features() -> None:
    shape = shaped(1000, None, "full.qcow2", "qcow2")
    header = b"".join(Layout(shape, Survey(shape.group_bits)).metadata(0, 200))

    magic, version, name_at, name_size = struct.unpack_from(">4sIQI", header)
    assert (magic, version) == (b"QFI\xfb", 3)
    assert header[name_at : name_at + name_size] == b"full.qcow2"
    assert struct.unpack_from(">QQQII", header, 72) == (0, 0, 0, 4, 104)
    assert header[104:117] == b"\xe2\x79\x2a\xca\0\0\0\5qcow2"


def test_a_layout_keeps_12_bytes_of_a_group() -> None:
    """1 PiB of data in clusters of 64 KiB has 2**21 groups; here are 2**14 of them."""

    def runs(count: int) -> Iterator[Run]:
        return ((n << 13, (n + 1) << 13, True) for n in range(count))

    tracemalloc.start()
    try:
        survey = Survey(13)
        survey.add(runs(1 << 14))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert kept < (12 << 14) * 1.3
    layout = Layout(Shape(PIB, 16), survey)
    at = layout.offset((1 << 14) - 1)
    assert layout.index_at(at) == (1 << 14) - 1
    assert layout.index_at(at - 1) == (1 << 14) - 2
