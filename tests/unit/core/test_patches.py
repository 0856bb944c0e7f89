# SPDX-License-Identifier: Apache-2.0
"""JSON PATCH bodies: each message of the contract, and JSON's own types."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.core.errors import BadRequest
from imageserver.core.patches import Flush, Zero, parse_patch
from imageserver.core.ranges import Span

TIB_100 = 100 << 40
NO_SIZE = 'missing or invalid "size"'
NOT_POSITIVE = '"size" must be positive'
BAD_OFFSET = 'invalid "offset"'
NEGATIVE_OFFSET = '"offset" must be non-negative'
BAD_FLUSH = 'invalid "flush"'
BAD_OP = 'unsupported op; only "zero" and "flush" are supported'
NO_OBJECT = "body must be a JSON object"


@pytest.mark.parametrize(
    ("body", "patch"),
    [
        pytest.param('{"op":"zero","size":1}', Zero(0, 1, False), id="defaults"),
        pytest.param(
            '{"op":"zero","offset":5,"size":6,"flush":true}', Zero(5, 6, True), id="all-members"
        ),
        pytest.param('{"op":"zero","size":1,"flush":false}', Zero(0, 1, False), id="no-flush"),
        pytest.param('{"op":"zero","size":1,"offset":-0}', Zero(0, 1, False), id="minus-zero"),
        pytest.param(
            f'{{"op":"zero","offset":{TIB_100},"size":{TIB_100}}}',
            Zero(TIB_100, TIB_100, False),
            id="100-tib",
        ),
        pytest.param(
            f'{{"op":"zero","offset":{2**70},"size":{2**80}}}',
            Zero(2**70, 2**80, False),
            id="over-uint64",
        ),
        pytest.param('{"op":"zero","size":1,"size":2}', Zero(0, 2, False), id="last-one-counts"),
        pytest.param('{"op":"zero","size":1,"more":[{}]}', Zero(0, 1, False), id="unknown-member"),
        pytest.param(' \r\n\t{"op":"zero","size":1}\n', Zero(0, 1, False), id="blanks-around"),
        pytest.param('{"op":"\\u007aero","size":1}', Zero(0, 1, False), id="escaped-letter"),
        pytest.param('{"op":"flush"}', Flush(), id="flush"),
        pytest.param(
            '{"op":"flush","size":-1,"offset":"x","flush":1}', Flush(), id="flush-ignores-the-rest"
        ),
    ],
)
def test_a_valid_body_is_an_operation(body: str, patch: Zero | Flush) -> None:
    assert parse_patch(body.encode()) == patch


_MESSAGES = {
    '"size" missing': ('{"op":"zero"}', NO_SIZE),
    '"size" null': ('{"op":"zero","size":null}', NO_SIZE),
    '"size" true': ('{"op":"zero","size":true}', NO_SIZE),
    '"size" false': ('{"op":"zero","size":false}', NO_SIZE),
    '"size" 1.0': ('{"op":"zero","size":1.0}', NO_SIZE),
    '"size" 1e3': ('{"op":"zero","size":1e3}', NO_SIZE),
    '"size" 1e999': ('{"op":"zero","size":1e999}', NO_SIZE),
    '"size" string': ('{"op":"zero","size":"1"}', NO_SIZE),
    '"size" list': ('{"op":"zero","size":[1]}', NO_SIZE),
    '"size" object': ('{"op":"zero","size":{"a":1}}', NO_SIZE),
    '"size" 0': ('{"op":"zero","size":0}', NOT_POSITIVE),
    '"size" -0': ('{"op":"zero","size":-0}', NOT_POSITIVE),
    '"size" -1': ('{"op":"zero","size":-1}', NOT_POSITIVE),
    '"size" very negative': (f'{{"op":"zero","size":{-(2**70)}}}', NOT_POSITIVE),
    '"offset" null': ('{"op":"zero","size":1,"offset":null}', BAD_OFFSET),
    '"offset" true': ('{"op":"zero","size":1,"offset":true}', BAD_OFFSET),
    '"offset" 0.0': ('{"op":"zero","size":1,"offset":0.0}', BAD_OFFSET),
    '"offset" string': ('{"op":"zero","size":1,"offset":"0"}', BAD_OFFSET),
    '"offset" list': ('{"op":"zero","size":1,"offset":[]}', BAD_OFFSET),
    '"offset" -1': ('{"op":"zero","size":1,"offset":-1}', NEGATIVE_OFFSET),
    '"flush" null': ('{"op":"zero","size":1,"flush":null}', BAD_FLUSH),
    '"flush" 0': ('{"op":"zero","size":1,"flush":0}', BAD_FLUSH),
    '"flush" 1': ('{"op":"zero","size":1,"flush":1}', BAD_FLUSH),
    '"flush" string': ('{"op":"zero","size":1,"flush":"true"}', BAD_FLUSH),
    "size before offset": ('{"op":"zero","size":0,"offset":-1,"flush":1}', NOT_POSITIVE),
    "offset before flush": ('{"op":"zero","size":1,"offset":-1,"flush":1}', NEGATIVE_OFFSET),
    "op missing": ('{"size":1}', BAD_OP),
    "op null": ('{"op":null}', BAD_OP),
    "op unknown": ('{"op":"trim"}', BAD_OP),
    "op in capitals": ('{"op":"ZERO","size":1}', BAD_OP),
    "op with blank": ('{"op":"zero ","size":1}', BAD_OP),
    "op list": ('{"op":["zero"],"size":1}', BAD_OP),
    "op object": ('{"op":{"zero":1}}', BAD_OP),
    "op number": ('{"op":0}', BAD_OP),
    "op lone surrogate": ('{"op":"\\ud800"}', BAD_OP),
    "name in capitals": ('{"OP":"flush"}', BAD_OP),
    "empty object": ("{}", BAD_OP),
    "list": ('[{"op":"flush"}]', NO_OBJECT),
    "string": ('"flush"', NO_OBJECT),
    "number": ("1", NO_OBJECT),
    "null": ("null", NO_OBJECT),
    "true": ("true", NO_OBJECT),
}


@pytest.mark.parametrize(("body", "message"), _MESSAGES.values(), ids=_MESSAGES.keys())
def test_a_wrong_body_is_refused_with_the_contracts_message(body: str, message: str) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_patch(body.encode())

    assert failure.value.message == message


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b" ", id="blank"),
        pytest.param(b"zero", id="bare-word"),
        pytest.param(b'{"op":"flush"', id="cut-short"),
        pytest.param(b'{"op":"flush",}', id="trailing-comma"),
        pytest.param(b"{'op':'flush'}", id="single-quotes"),
        pytest.param(b'{"op":"flush"} {}', id="two-values"),
        pytest.param(b'{"op":"flush"}\0', id="nul-at-the-end"),
        pytest.param(b'{"op":"fl\nush"}', id="control-character"),
        pytest.param(b'{"op":"zero","size":01}', id="leading-zero"),
        pytest.param(b'{"op":"zero","size":+1}', id="plus"),
        pytest.param(b'{"op":"zero","size":1_0}', id="underscore"),
        pytest.param(b'{"op":"zero","size":0x10}', id="hexadecimal"),
        pytest.param('{"op":"zero","size":\u0661}'.encode(), id="arabic-digit"),
        pytest.param(b'{"op":"\xff"}', id="invalid-utf8"),
        pytest.param(b"\xff", id="invalid-utf8-alone"),
        pytest.param(b"[" * 60_000, id="deep-and-cut-short"),
        pytest.param(b"[" * 30_000 + b"]" * 30_000, id="deep-list"),
        pytest.param(b'{"a":' * 10_000 + b"1" + b"}" * 10_000, id="deep-object"),
        pytest.param(b'{"op":"zero","size":NaN}', id="nan"),
        pytest.param(b'{"op":"flush","more":NaN}', id="nan-unused"),
        pytest.param(b'{"op":"flush","more":-Infinity}', id="infinity"),
        pytest.param(b'{"op":"flush","x":"\xed\xa0\x80"}', id="utf8-surrogate"),
        pytest.param('{"op":"flush"}'.encode("utf-16"), id="utf-16"),
    ],
)
def test_a_body_that_is_not_json_is_refused_as_such(body: bytes) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_patch(body)

    assert failure.value.message.startswith("invalid JSON: ")


_HUGE = b'{"op":"zero","size":' + b"9" * 5000 + b"}"


def test_a_size_of_5000_digits_is_clipped_like_any_other() -> None:
    patch = parse_patch(_HUGE)

    assert isinstance(patch, Zero)
    assert patch.resolve(100) == Span(0, 100, 100)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 60_000, id="deep"),
        pytest.param(b"\xff", id="undecodable"),
    ],
)
def test_a_refusal_speaks_of_json_and_not_of_the_interpreter(body: bytes) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_patch(body)

    message = failure.value.message
    assert [word for word in ("sys.", "recursion", "codec") if word in message] == []


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=64))
def test_any_bytes_are_parsed_or_refused(body: bytes) -> None:
    try:
        parsed = parse_patch(body)
    except BadRequest:
        return

    assert isinstance(parsed, Zero | Flush)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)


@settings(max_examples=200, deadline=None)
@given(size=_VALUES | st.integers(1, 9), offset=_VALUES | st.integers(0, 9), flush=st.booleans())
def test_only_integers_make_a_zero(size: object, offset: object, flush: bool) -> None:
    body = json.dumps({"op": "zero", "size": size, "offset": offset, "flush": flush}).encode()
    good = type(size) is int and size > 0 and type(offset) is int and offset >= 0
    try:
        parsed = parse_patch(body)
    except BadRequest:
        assert not good
    else:
        assert good
        assert parsed == Zero(offset, size, flush)


@pytest.mark.parametrize(
    ("offset", "size", "image_size", "span"),
    [
        pytest.param(0, 1, 100, Span(0, 1, 100), id="first-byte"),
        pytest.param(10, 20, 100, Span(10, 30, 100), id="middle"),
        pytest.param(0, 100, 100, Span(0, 100, 100), id="all-of-it"),
        pytest.param(99, 1, 100, Span(99, 100, 100), id="last-byte"),
        pytest.param(99, 2, 100, Span(99, 100, 100), id="clipped-by-one"),
        pytest.param(0, 2**80, 100, Span(0, 100, 100), id="clipped-over-uint64"),
        pytest.param(1, TIB_100, TIB_100, Span(1, TIB_100, TIB_100), id="100-tib"),
    ],
)
def test_a_zero_is_clipped_to_the_image(
    offset: int, size: int, image_size: int, span: Span
) -> None:
    assert Zero(offset, size, False).resolve(image_size) == span


@pytest.mark.parametrize(
    ("offset", "image_size"),
    [
        pytest.param(100, 100, id="at-the-end"),
        pytest.param(101, 100, id="beyond-the-end"),
        pytest.param(2**70, 100, id="over-uint64"),
        pytest.param(0, 0, id="empty-image"),
    ],
)
def test_a_zero_that_begins_outside_the_image_is_refused(offset: int, image_size: int) -> None:
    with pytest.raises(BadRequest) as failure:
        Zero(offset, 1, False).resolve(image_size)

    assert failure.value.message == "offset must be less than image size"
