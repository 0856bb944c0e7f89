# SPDX-License-Identifier: Apache-2.0
"""What a download believes of an earlier one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from imageserver.client.failures import LocalFailure
from imageserver.client.moving.resume import Saved, State, encode, identity, parse
from imageserver.client.plan import Spans

IMAGE = identity(100, "raw full", "/images/x", Spans([(0, 10), (20, 100)]))


def test_what_was_saved_is_loaded(tmp_path: Path):
    state = State(str(tmp_path / "state"))
    assert (state.exists(), state.load()) == (False, None)
    state.save(IMAGE, [(0, 5), (20, 30)], Spans([(30, 100)]))
    saved = Saved(IMAGE, [(0, 5), (20, 30)], [(30, 100)])
    assert (state.exists(), state.load()) == (True, saved)
    state.remove()
    state.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        replace(IMAGE, size=101),
        replace(IMAGE, kind="qcow2 full"),
        replace(IMAGE, path="/images/y"),
        identity(100, "raw full", "/images/x", Spans([(0, 10), (21, 100)])),
        identity(100, "raw full", "/images/x", Spans(), Spans([(0, 10), (20, 100)])),
    ],
    ids=["size", "kind", "path", "extents", "zeros"],
)
def test_another_image_is_another(other):
    assert parse(encode(other, [(0, 5)])) == Saved(other, [(0, 5)], [])
    assert other != IMAGE


@pytest.mark.parametrize(
    "done",
    [[[5, 5]], [[5, 4]], [[-1, 4]], [[0, 5], [4, 6]], [[0, 101]], [[0, 1.5]], [[0]], "x", None],
    ids=str,
)
@pytest.mark.parametrize("name", ["done", "undone"])
def test_ranges_that_cannot_be_are_not_believed(name, done):
    fields = json.loads(encode(IMAGE, [])) | {name: done}
    assert parse(json.dumps(fields).encode()) is None


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b"\xff", b'{"imagectl":2', b"[" * 100_000],
    ids=lambda text: repr(text[:9]),
)
def test_damage_is_nothing_done(text):
    assert parse(text) is None


def test_a_later_form_is_not_guessed_at():
    fields = json.loads(encode(IMAGE, [])) | {"imagectl": 3}
    assert parse(json.dumps(fields).encode()) is None


def test_a_state_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    (tmp_path / "state").mkdir()
    with pytest.raises(LocalFailure):
        State(str(tmp_path / "state")).save(IMAGE, [])
    assert list(tmp_path.iterdir()) == [tmp_path / "state"]
