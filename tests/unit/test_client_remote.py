# SPDX-License-Identifier: Apache-2.0
"""What is believed of a server's answers."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.errors import Broken, Failed
from imageserver.client.remote import Abilities, parse_abilities, parse_extents

LIST = [
    {"start": 0, "length": 65536, "zero": True, "hole": True},
    {"start": 65536, "length": 10, "dirty": True, "zero": False},
]
EXTENTS = [(0, 65536, True, False), (65536, 10, False, True)]


def test_our_answer_to_options_is_understood():
    body = b'{"unix_socket":"/s","features":["extents","zero"],"max_readers":8,"max_writers":0}'
    assert parse_abilities(body, "GET, HEAD, OPTIONS") == Abilities(
        frozenset({"extents", "zero"}), 8, 0, "/s", frozenset({"GET", "HEAD", "OPTIONS"})
    )


def test_what_options_leaves_out_is_not_there():
    assert parse_abilities(b"", "") == Abilities(frozenset(), 1, 1, None, frozenset())


@pytest.mark.parametrize("body", [b"<html>", b"[]"])
def test_another_kind_of_server_is_found_out(body):
    with pytest.raises(Failed, match="this is no image server"):
        parse_abilities(body, "")


@given(st.lists(st.integers(0, 140)), st.sampled_from([None, 1]))
def test_extents_may_come_in_any_pieces(cuts, indent):
    text = json.dumps(LIST, indent=indent).encode()
    marks = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(marks)]
    assert list(parse_extents(parts)) == EXTENTS


@pytest.mark.parametrize("text", [b"[]", b" [ ]\n"])
def test_an_empty_image_has_no_extents(text):
    assert list(parse_extents([text])) == []


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[",
        b'[{"start":0,"length":1}',
        b'[{"start":0,"length":1}]]',
        b'[{"start":1,"length":1}]',
        b'[{"start":0,"length":1},{"start":2,"length":1}]',
        b'[{"start":0,"length":0}]',
        b'[{"start":0,"length":true}]',
        b'[{"start":0}]',
        b'[{"start":0,"length":1} {"start":1,"length":1}]',
        b"[[]]",
    ],
    ids=repr,
)
def test_a_list_that_does_not_cover_the_image_is_not_believed(text):
    with pytest.raises(Broken):
        list(parse_extents([text]))
