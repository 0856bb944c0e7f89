# SPDX-License-Identifier: Apache-2.0
"""What a download believes of an earlier one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from imageserver.client.plan import Spans
from imageserver.client.resume import State, encode, identity, parse

IMAGE = identity(100, "raw full", Spans([(0, 10), (20, 100)]))


def test_what_was_saved_is_loaded(tmp_path: Path):
    state = State(str(tmp_path / "state"))
    assert (state.exists(), state.load(IMAGE)) == (False, None)
    state.save(IMAGE, [(0, 5), (20, 30)])
    assert (state.exists(), state.load(IMAGE)) == (True, [(0, 5), (20, 30)])
    state.remove()
    state.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        replace(IMAGE, size=101),
        replace(IMAGE, kind="qcow2 full"),
        identity(100, "raw full", Spans([(0, 10), (21, 100)])),
        identity(100, "raw full", Spans(), Spans([(0, 10), (20, 100)])),
    ],
    ids=["size", "kind", "extents", "zeros"],
)
def test_another_image_has_nothing_done(other):
    assert parse(encode(IMAGE, [(0, 5)]), other) is None


@pytest.mark.parametrize(
    "done",
    [[[5, 5]], [[5, 4]], [[-1, 4]], [[0, 5], [4, 6]], [[0, 101]], [[0, 1.5]], [[0]], "x", None],
    ids=str,
)
def test_ranges_that_cannot_be_are_not_believed(done):
    fields = json.loads(encode(IMAGE, [])) | {"done": done}
    assert parse(json.dumps(fields).encode(), IMAGE) is None


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'{"imagectl":1'], ids=repr)
def test_damage_is_nothing_done(text):
    assert parse(text, IMAGE) is None


def test_a_later_form_is_not_guessed_at():
    fields = json.loads(encode(IMAGE, [])) | {"imagectl": 2}
    assert parse(json.dumps(fields).encode(), IMAGE) is None
