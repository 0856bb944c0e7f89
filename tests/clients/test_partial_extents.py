# SPDX-License-Identifier: Apache-2.0
"""Extents of a span of the image (docs/api.md), to the letter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import nbdkit, qemu_img, qemu_io, qemu_nbd

M = 1 << 20


@pytest.fixture(scope="module")
def mapped(workplace: Path) -> Iterator[Path]:
    """8 MiB: data in [1, 3) and [6, 7), of which [2, 3) is dirty, too, in MiB."""
    image = workplace / "mapped.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, 8 * M)
    qemu_io(image, "qcow2", "write -P 1 1M 2M", "write -P 1 6M 1M")
    qemu_img("bitmap", "--add", "--granularity", "64k", image, "b0")
    qemu_io(image, "qcow2", "write -P 2 2M 1M")
    with qemu_nbd(image, "--bitmap=b0", fmt="qcow2") as sock:
        yield sock


ZEROS = [(0, M, True), (M, 2 * M, False), (3 * M, 3 * M, True), (6 * M, M, False), (7 * M, M, True)]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("start=0", ZEROS),
        (f"length={8 * M}", ZEROS),
        (f"start=0&length={100 * M}", ZEROS),
        (f"start=0&length={'9' * 300}", ZEROS),
        (f"start={2 * M}", [(2 * M, M, False), *ZEROS[2:]]),
        (f"length={2 * M}", [(0, M, True), (M, M, False)]),
        (f"start={2 * M}&length={M}", [(2 * M, M, False)]),
        (f"start={M + 5}&length=7", [(M + 5, 7, False)]),
        (f"start={3 * M - 1}&length=2", [(3 * M - 1, 1, False), (3 * M, 1, True)]),
        (f"start={8 * M - 1}", [(8 * M - 1, 1, True)]),
        (f"start={8 * M - 1}&length=5", [(8 * M - 1, 1, True)]),
        (f"context=zero&start=00{M}&length=1", [(M, 1, False)]),
    ],
)
def test_extents_of_a_span_are_cut_to_it(server, mapped, query, expected):
    path = server.add("mapped", socket=str(mapped))
    answer = server.request("GET", f"{path}/extents?{query}")
    assert answer.status == 200
    assert answer.json == [{"start": s, "length": n, "zero": z} for s, n, z in expected]


def test_dirty_extents_of_a_span_are_cut_to_it(server, mapped):
    path = server.add("mapped", socket=str(mapped), export_bitmap="b0")
    query = f"context=dirty&start={M + 1}&length={2 * M}"
    assert server.request("GET", f"{path}/extents?{query}").json == [
        {"start": M + 1, "length": M - 1, "dirty": False, "zero": False},
        {"start": 2 * M, "length": M, "dirty": True, "zero": False},
        {"start": 3 * M, "length": 1, "dirty": False, "zero": True},
    ]


@pytest.mark.parametrize("start", [8 * M, 8 * M + 1, 2**63, 2**64, "9" * 500], ids=str)
def test_a_span_beyond_the_image_is_not_satisfiable(server, mapped, start):
    path = server.add("mapped", socket=str(mapped))
    answer = server.request("GET", f"{path}/extents?start={start}&length=1")
    assert answer.refusal == (416, "range not satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{8 * M}"


def test_an_empty_image_has_no_span(server, workplace):
    with nbdkit(workplace / "empty.sock", "memory", "0") as sock:
        path = server.add("empty", socket=str(sock))
        assert server.request("GET", path + "/extents").json == []
        assert server.request("GET", path + "/extents?start=0").status == 416


NUMBER = 'invalid "{}": it must be a number of bytes'


@pytest.mark.parametrize(
    ("query", "message"),
    [
        *((f"start={value}", NUMBER.format("start")) for value in ("", "-1", "%2B1", "1_0", "x")),
        *((f"length={value}", NUMBER.format("length")) for value in ("", "-1", "1.0", "1e3")),
        ("start=%D9%A1", NUMBER.format("start")),
        ("start=1&start=2", NUMBER.format("start")),
        ("length=0", '"length" must be positive'),
    ],
)
def test_a_malformed_span_is_refused(server, mapped, query, message):
    path = server.add("mapped", socket=str(mapped))
    assert server.request("GET", f"{path}/extents?{query}").refusal == (400, message)


def test_a_server_without_block_status_answers_for_the_span_alone(server, workplace):
    with nbdkit(workplace / "flat.sock", "--filter=noextents", "memory", "1M") as sock:
        path = server.add("flat", socket=str(sock))
        answer = server.request("GET", path + "/extents?start=10&length=20")
    assert answer.json == [{"start": 10, "length": 20, "zero": False}]


def test_a_file_has_no_extents_of_a_span_either(server, workplace):
    path = server.add("file", backend="file", file=str(workplace / "file"))
    answer = server.request("GET", path + "/extents?start=0")
    assert answer.refusal == (400, "extents not supported for file backend")
