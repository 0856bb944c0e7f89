# SPDX-License-Identifier: Apache-2.0
"""Where samples are taken."""

from imageserver.client.moving.verify import samples
from imageserver.client.plan import MIB, Spans


def test_samples_lie_in_the_data_and_at_its_ends():
    data = Spans([(MIB, 2 * MIB - 7), (5 * MIB, 9 * MIB), (20 * MIB, 20 * MIB + 9)])
    chosen = samples(data, lambda _below: 3 * MIB)
    assert Spans(chosen).without(data).total == 0
    assert (chosen[0], chosen[-1]) == ((MIB, 2 * MIB - 7), (20 * MIB, 20 * MIB + 9))
    assert sum(stop - start for start, stop in chosen) == 2 * MIB + 64 * 1024
    assert samples(Spans()) == []
