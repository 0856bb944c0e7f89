# SPDX-License-Identifier: Apache-2.0
"""Extents as JSON text, and what is written while there are none."""

import itertools
import json

from imageserver.core.extents import Extent
from imageserver.web.extents_resource import encode, with_dirty, with_hole, with_zero

FIRST: Extent = (0, 4096, True, False)
SECOND: Extent = (4096, 4096, False, True)


def test_batches_become_one_compact_list():
    pieces = encode(iter([[FIRST], [], [SECOND], []]), with_dirty)
    assert b"".join(pieces) == (
        b'[{"start":0,"length":4096,"dirty":false,"zero":true},'
        b'{"start":4096,"length":4096,"dirty":true,"zero":false}]'
    )


def test_an_extent_of_a_layer_says_whether_it_is_a_hole():
    pieces = encode(iter([[FIRST, SECOND]]), with_hole)
    assert b"".join(pieces) == (
        b'[{"start":0,"length":4096,"zero":true,"hole":false},'
        b'{"start":4096,"length":4096,"zero":false,"hole":true}]'
    )


def test_nothing_is_an_empty_list():
    assert b"".join(encode(iter([[], []]), with_zero)) == b"[]"


def test_white_space_is_written_for_each_second_without_an_extent():
    clock = itertools.count(0, 0.4)
    batches: list[list[Extent]] = [[]] * 6 + [[FIRST]] + [[]] * 6 + [[SECOND]]
    pieces = list(encode(iter(batches), with_zero, clock=lambda: next(clock)))
    assert [piece.isspace() for piece in pieces] == [True, True, False, True, True, False, False]
    assert [extent["start"] for extent in json.loads(b"".join(pieces))] == [0, 4096]
