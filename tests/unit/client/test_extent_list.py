# SPDX-License-Identifier: Apache-2.0
"""A list of extents is believed only if it covers the image."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.failures import Broken, Failed
from imageserver.client.http.extent_list import parse_extents

LIST = [
    {"start": 0, "length": 65536, "zero": True, "hole": True},
    {"start": 65536, "length": 10, "dirty": True, "zero": False},
]
#: Nobody asked what is dirty.
EXTENTS = [(0, 65536, True, False), (65536, 10, False, False)]


@given(st.lists(st.integers(0, 140)), st.sampled_from([None, 1]))
def test_extents_may_come_in_any_pieces(cuts, indent):
    text = json.dumps(LIST, indent=indent).encode()
    marks = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(marks)]
    assert list(parse_extents(parts)) == EXTENTS


@pytest.mark.parametrize("dirty", [True, False])
def test_what_is_dirty_is_told_if_it_was_asked_for(dirty):
    text = b'[{"start":0,"length":1,"zero":false,"dirty":%s}]' % json.dumps(dirty).encode()
    assert list(parse_extents([text], "dirty")) == [(0, 1, False, dirty)]
    assert list(parse_extents([text], "zero")) == [(0, 1, False, False)]


def test_neighbours_that_differ_in_what_is_ignored_are_one_extent():
    text = (
        b'[{"start":0,"length":4,"zero":true,"hole":true},'
        b'{"start":4,"length":4,"zero":true,"hole":false},'
        b'{"start":8,"length":4,"zero":false,"hole":false}]'
    )
    assert list(parse_extents([text])) == [(0, 8, True, False), (8, 4, False, False)]


@pytest.mark.parametrize("text", [b"[]", b" [ ]\n"])
def test_an_empty_image_has_no_extents(text):
    assert list(parse_extents([text])) == []


@pytest.mark.parametrize("text", [b"", b"[", b'[{"start":0,"length":1,"zero":true}'], ids=repr)
def test_a_list_that_was_cut_is_asked_for_again(text):
    with pytest.raises(Broken, match=r"^the list of extents was cut$"):
        list(parse_extents([text]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{}", "the list of extents is no JSON list"),
        (b'[{"start":1,"length":1,"zero":true}]', "the extents have a gap at 0"),
        (
            b'[{"start":0,"length":1,"zero":true},{"start":2,"length":1,"zero":true}]',
            "the extents have a gap at 1",
        ),
        (b'[{"start":0,"length":0,"zero":true}]', "the extents have a gap at 0"),
        (b'[{"start":0,"length":-5,"zero":true}]', "the extents have a gap at 0"),
        (b'[{"start":false,"length":1,"zero":true}]', "an extent at 0 has no start or length"),
        (b'[{"start":0.0,"length":1,"zero":true}]', "an extent at 0 has no start or length"),
        (b'[{"start":0,"length":true,"zero":true}]', "an extent at 0 has no start or length"),
        (b'[{"start":0}]', "an extent at 0 has no start or length"),
        (
            b'[{"start":0,"length":1180591620717411303424,"zero":true}]',
            "an extent at 0 ends beyond any image",
        ),
        (b"[1,{}]", "an extent at 0 is no JSON object"),
        (b'[{"start":0,"length":1}]', "the extent at 0 does not tell whether it is zero"),
        (
            b'[{"start":0,"length":1,"zero":"false"}]',
            "the extent at 0 does not tell whether it is zero",
        ),
    ],
    ids=repr,
)
def test_a_list_that_does_not_cover_the_image_is_not_believed(text, sentence):
    with pytest.raises(Failed) as refusal:
        list(parse_extents([text]))
    assert (type(refusal.value), str(refusal.value)) == (Failed, sentence)


@pytest.mark.parametrize(
    "text",
    [
        b'[{"start":0,"length":1,"zero":true} {"start":1,"length":1,"zero":true}]',
        b"[" + b"[" * 100_000 + b"{}",
    ],
    ids=["no comma", "deep"],
)
def test_what_is_no_json_is_told(text):
    with pytest.raises(Failed, match="the list of extents is no JSON: "):
        list(parse_extents([text]))


@pytest.mark.parametrize("dirty", ["", ',"dirty":1', ',"dirty":"true"', ',"dirty":null'])
def test_an_extent_that_does_not_tell_whether_it_is_dirty_is_not_unchanged(dirty):
    text = b'[{"start":0,"length":1,"zero":false%s}]' % dirty.encode()
    with pytest.raises(Failed, match=r"^the extent at 0 does not tell whether it is dirty$"):
        list(parse_extents([text], "dirty"))
