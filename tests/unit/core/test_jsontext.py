# SPDX-License-Identifier: Apache-2.0
"""How deep a JSON text may be does not depend on the interpreter."""

import json
import time

import pytest

from imageserver.core.jsontext import MAX_DEPTH, InvalidJson, parse_json


@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")], ids=["lists", "objects"])
def test_what_is_as_deep_as_may_be_is_taken_and_one_deeper_is_not(pair: tuple[bytes, bytes]):
    begin, end = pair
    assert parse_json(begin * MAX_DEPTH + b"1" + end * MAX_DEPTH)
    with pytest.raises(InvalidJson, match=r"^nested too deeply$"):
        parse_json(begin * (MAX_DEPTH + 1) + b"1" + end * (MAX_DEPTH + 1))


def test_what_is_wide_or_only_looks_deep_is_taken():
    wide = [{"name": "[{" * MAX_DEPTH, 'quoted "[': "\\"}, []] * MAX_DEPTH
    assert parse_json(json.dumps(wide).encode()) == wide


def test_a_string_without_an_end_takes_no_longer():
    text = b"[" * MAX_DEPTH + b'["' + b'\\"' * 500_000
    began = time.monotonic()
    with pytest.raises(InvalidJson):
        parse_json(text)
    assert time.monotonic() - began < 5  # in quadratic time, hours


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbf{}", b"", b"{", b'{"a":1,}', b"[1 2]", b"{} {}", b"'a'"]
)
def test_what_is_no_json_is_refused_in_the_parsers_words(text: bytes):
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text.decode())
    with pytest.raises(InvalidJson) as ours:
        parse_json(text)

    assert str(ours.value) == f"{theirs.value.msg} at character {theirs.value.pos}"
