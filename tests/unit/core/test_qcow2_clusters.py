# SPDX-License-Identifier: Apache-2.0
"""Extents to clusters, against a look at each cluster by itself."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.core.extents import Extent
from imageserver.core.qcow2_clusters import Clusters, Run, split

BITS = 3  # clusters of 8 bytes: every way an extent can lie across them is within reach
PARTS = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=12)


def laid(parts: list[tuple[int, bool, bool]]) -> list[Extent]:
    """Return extents of these lengths and flags, one after the other."""
    extents, at = [], 0
    for length, zero, dirty in parts:
        extents.append((at, length, zero, dirty))
        at += length
    return extents


def seen(extents: list[Extent], *, overlay: bool) -> dict[int, bool]:
    """Return which clusters are allocated, and whether with data."""
    found = {}
    size = extents[-1][0] + extents[-1][1] if extents else 0
    for cluster in range(-(-size // 8)):
        inside = [e for e in extents if e[0] < cluster * 8 + 8 and e[0] + e[1] > cluster * 8]
        has_data = any(not zero for _, _, zero, _ in inside)
        if any(dirty for _, _, _, dirty in inside) if overlay else has_data:
            found[cluster] = has_data
    return found


@pytest.mark.parametrize("overlay", [False, True], ids=["full", "overlay"])
@given(parts=PARTS, batch=st.integers(1, 4))
def test_each_cluster_is_in_a_run_exactly_as_its_bytes_say(
    parts: list[tuple[int, bool, bool]], batch: int, overlay: bool
) -> None:
    extents, clusters = laid(parts), Clusters(BITS, overlay=overlay)
    runs: list[Run] = []
    for at in range(0, len(extents), batch):
        runs += clusters.add(extents[at : at + batch])
    runs += clusters.finish()

    told = {at: has_data for first, stop, has_data in runs for at in range(first, stop)}
    assert told == seen(extents, overlay=overlay)
    joins = [a[1] == b[0] and a[2] == b[2] for a, b in pairwise(runs)]
    assert not any(joins), "neighbours that agree are one run"


def test_runs_are_cut_at_groups() -> None:
    assert list(split([(1, 2, True), (3, 9, False), (12, 16, True)], 2)) == [
        *((1, 2, True), (3, 4, False), (4, 8, False), (8, 9, False), (12, 16, True)),
    ]
