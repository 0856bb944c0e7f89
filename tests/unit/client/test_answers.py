# SPDX-License-Identifier: Apache-2.0
"""What OPTIONS is taken to say."""

import pytest

from imageserver.client.failures import Different, Failed
from imageserver.client.http.answers import Abilities, check_range, parse_abilities, parse_bitmap


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


@pytest.mark.parametrize("size", [None, 100, 99, 101])
def test_a_range_is_of_an_image_of_the_size_that_was_told(size: int | None):
    headers = {"Content-Range": "bytes 0-9/100", "Content-Length": "10"}
    if size in {None, 100}:
        check_range(headers, 0, 10, size)
        return
    with pytest.raises(Different, match=f"the image had {size} bytes, and has 100"):
        check_range(headers, 0, 10, size)


def test_deep_json_is_no_answer_to_options():
    with pytest.raises(Failed, match="this is no image server"):
        parse_abilities(b"[" * 100_000, "")


@pytest.mark.parametrize(
    ("headers", "bitmap"),
    [
        ({}, None),
        ({"Image-Dirty-Bitmap": "none"}, ""),
        ({"Image-Dirty-Bitmap": "%6Eone"}, "none"),
        ({"Image-Dirty-Bitmap": "Gr%C3%B6%C3%9Fe"}, "Größe"),
    ],
)
def test_whether_a_bitmap_was_used_is_understood(headers, bitmap):
    assert parse_bitmap(headers) == bitmap
