# SPDX-License-Identifier: Apache-2.0
"""Extents as JSON text, and what is written while there are none."""

import itertools
import json

from imageserver.core.extents import Extent
from imageserver.web.extents_resource import encode

FIRST: Extent = (0, 4096, True, False)
SECOND: Extent = (4096, 4096, False, True)


def test_batches_become_one_compact_list():
    pieces = encode(iter([[FIRST], [], [SECOND], []]), dirty=True)
    assert b"".join(pieces) == (
        b'[{"start":0,"length":4096,"dirty":false,"zero":true},'
        b'{"start":4096,"length":4096,"dirty":true,"zero":false}]'
    )


def test_nothing_is_an_empty_list():
    assert b"".join(encode(iter([[], []]), dirty=False)) == b"[]"


def test_white_space_is_written_for_each_second_without_an_extent():
    clock = itertools.count(0, 0.4)
    batches: list[list[Extent]] = [[]] * 6 + [[FIRST]] + [[]] * 6 + [[SECOND]]
    pieces = list(encode(iter(batches), dirty=False, clock=lambda: next(clock)))
    assert [piece.isspace() for piece in pieces] == [True, True, False, True, True, False, False]
    assert [extent["start"] for extent in json.loads(b"".join(pieces))] == [0, 4096]
