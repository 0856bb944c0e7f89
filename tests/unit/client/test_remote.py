# SPDX-License-Identifier: Apache-2.0
"""What is believed of a server's answers."""

import itertools
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.failures import Broken, Failed, Refused
from imageserver.client.http.access import Access
from imageserver.client.http.answers import Abilities, parse_abilities
from imageserver.client.http.extent_list import parse_extents
from imageserver.client.http.remote import Remote
from imageserver.client.http.transport import Transport

LIST = [
    {"start": 0, "length": 65536, "zero": True, "hole": True},
    {"start": 65536, "length": 10, "dirty": True, "zero": False},
]
#: Nobody asked what is dirty.
EXTENTS = [(0, 65536, True, False), (65536, 10, False, False)]


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


@pytest.mark.parametrize("dirty", [True, False])
def test_what_is_dirty_is_told_if_it_was_asked_for(dirty):
    text = b'[{"start":0,"length":1,"zero":false,"dirty":%s}]' % json.dumps(dirty).encode()
    assert list(parse_extents([text], "dirty")) == [(0, 1, False, dirty)]
    assert list(parse_extents([text], "zero")) == [(0, 1, False, False)]


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


def test_deep_json_is_no_answer_to_options():
    with pytest.raises(Failed, match="this is no image server"):
        parse_abilities(b"[" * 100_000, "")


@pytest.mark.parametrize(
    ("url", "sock", "cpus", "asked", "most", "many"),
    [
        ("http://backup.example/images/a", None, 1, None, 8, 4),
        ("http://backup.example/images/a", None, 64, None, 3, 3),
        ("http://127.0.0.1:54323/images/a", None, 2, None, 8, 1),
        ("http://localhost:54323/images/a", None, 5, None, 8, 2),
        ("http://[::1]:54323/images/a", None, 64, None, 8, 4),
        ("http://backup.example/images/a", "/run/imageserver.sock", 1, None, 8, 1),
        ("http://127.0.0.1:54323/images/a", None, 2, 8, 8, 8),
        ("http://127.0.0.1:54323/images/a", None, 2, 8, 0, 1),
    ],
)
def test_a_server_on_this_machine_shares_its_cpus(
    monkeypatch: pytest.MonkeyPatch, url, sock, cpus, asked, most, many
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: range(cpus))
    assert Remote(Access(url, unix_socket=sock)).connections(asked, most) == many


@pytest.mark.parametrize(
    ("url", "image", "extents", "flush"),
    [
        ("/images/x", "/images/x", "/images/x/extents?context=zero", "/images/x/flush"),
        ("/images/x//", "/images/x", "/images/x/extents?context=zero", "/images/x/flush"),
        (
            "/images/x/?a=b/",
            "/images/x?a=b/",
            "/images/x/extents?context=zero&a=b/",
            "/images/x/flush?a=b/",
        ),
        ("/?a=b", "/?a=b", "/extents?context=zero&a=b", "/flush?a=b"),
        ("", "/", "/extents?context=zero", "/flush"),
    ],
    ids=lambda target: target or "none",
)
def test_what_lies_below_an_image_goes_between_path_and_query(
    monkeypatch: pytest.MonkeyPatch, url, image, extents, flush
):
    asked = []

    def request(_self, _method, target, **_rest):
        asked.append(target)
        raise Refused("no")

    monkeypatch.setattr(Transport, "request", request)
    remote = Remote(Access(f"http://x{url}"))
    for action in (remote.abilities, lambda: list(remote.extents()), remote.flush_file):
        with pytest.raises(Refused):
            action()
    assert asked == [image, extents, flush]
