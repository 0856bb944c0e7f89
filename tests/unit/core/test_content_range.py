# SPDX-License-Identifier: Apache-2.0
"""Content-Range of a body (docs/api.md): where it belongs, and the exact refusal of all else."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imageserver.core.errors import BadRequest, RangeOutsideImage
from imageserver.core.ranges import ContentRange, Span, parse_content_range

OFF_T_MAX = 2**63 - 1
SIZE = 100


@pytest.mark.parametrize(
    ("header", "length", "expected"),
    [
        pytest.param("bytes 0-0/*", 1, ContentRange(0, 1, None), id="first-byte"),
        pytest.param("bytes 0-99/*", 100, ContentRange(0, 100, None), id="all-of-it"),
        pytest.param("bytes 99-99/*", 1, ContentRange(99, 1, None), id="last-byte"),
        pytest.param("bytes 10-19/100", 10, ContentRange(10, 10, 100), id="with-size"),
        pytest.param("bytes 10-*/*", 10, ContentRange(10, 10, None), id="length-from-the-body"),
        pytest.param("bytes 10-*/100", 10, ContentRange(10, 10, 100), id="size-alone"),
        pytest.param("BYTES 1-2/*", 2, ContentRange(1, 2, None), id="unit-upper-case"),
        pytest.param(" bytes 1-2/* \t", 2, ContentRange(1, 2, None), id="blanks-around"),
        pytest.param("bytes 007-008/0100", 2, ContentRange(7, 2, 100), id="leading-zeros"),
        pytest.param(
            f"bytes {OFF_T_MAX - 1}-*/*", 1, ContentRange(OFF_T_MAX - 1, 1, None), id="off-t-max"
        ),
    ],
)
def test_a_content_range_says_where_the_body_belongs(
    header: str, length: int, expected: ContentRange
) -> None:
    assert parse_content_range(header, length) == expected


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("", id="empty"),
        pytest.param("bytes", id="unit-alone"),
        pytest.param("bytes ", id="nothing-after-the-unit"),
        pytest.param("bytes */*", id="all-stars"),
        pytest.param("bytes */100", id="unsatisfied-range"),
        pytest.param("bytes 0-9", id="no-size"),
        pytest.param("bytes 0-9/", id="empty-size"),
        pytest.param("bytes 0-/*", id="open"),
        pytest.param("bytes -10/*", id="suffix"),
        pytest.param("bytes *-9/*", id="star-first"),
        pytest.param("bytes 9-0/*", id="backwards"),
        pytest.param("bytes=0-9/*", id="equals"),
        pytest.param("bytes=0-9", id="range"),
        pytest.param("0-9/*", id="no-unit"),
        pytest.param("items 0-9/*", id="other-unit"),
        pytest.param("bytes 0-9/*, bytes 20-29/*", id="two"),
        pytest.param("bytes 0-9,20-29/*", id="two-ranges"),
        pytest.param("bytes  0-9/*", id="two-blanks"),
        pytest.param("bytes\t0-9/*", id="tab"),
        pytest.param("bytes 0 - 9/*", id="blanks-around-the-dash"),
        pytest.param("bytes 0-9 / *", id="blanks-around-the-slash"),
        pytest.param("bytes +0-9/*", id="plus"),
        pytest.param("bytes 0--1/*", id="negative-last"),
        pytest.param("bytes 1_0-1_9/*", id="underscores"),
        pytest.param("bytes 0x0-0x9/*", id="hexadecimal"),
        pytest.param("bytes 0-9/1e2", id="exponent"),
        pytest.param("bytes 0-9/**", id="two-stars"),
        pytest.param("Xbytes 0-9/*X", id="letters-around"),
        pytest.param("bytes 10-9/*", id="nothing"),
        pytest.param("bytes \u0660-\u0669/*", id="arabic-digits"),
        pytest.param("bytes 0-9/\u0661", id="arabic-size"),
        pytest.param("bytes 0-9/*\n", id="newline"),
        pytest.param("byte\u017f 0-9/*", id="long-s-in-the-unit"),
    ],
)
def test_a_malformed_content_range_is_refused(header: str) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_content_range(header, 10)

    assert failure.value.message == "invalid Content-Range header"


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        pytest.param("bytes 0-9/*", 0, "Content-Length must be positive", id="empty-body"),
        pytest.param("bytes 0-*/*", 0, "Content-Length must be positive", id="empty-star"),
        ("bytes 0-9/*", 9, "Content-Length (9) must equal range length (10)"),
        ("bytes 0-9/*", 11, "Content-Length (11) must equal range length (10)"),
        pytest.param(
            "bytes 500-509/*", 1, "Content-Length (1) must equal range length (10)", id="outside"
        ),
    ],
)
def test_a_body_of_another_length_is_refused(header: str, length: int, message: str) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_content_range(header, length)

    assert failure.value.message == message


@pytest.mark.parametrize(
    ("header", "length"),
    [
        pytest.param("bytes 100-100/*", 1, id="at-the-end"),
        pytest.param("bytes 99-100/*", 2, id="across-the-end"),
        pytest.param("bytes 0-100/*", 101, id="longer-than-the-image"),
        pytest.param("bytes 99-*/*", 2, id="star-across-the-end"),
        pytest.param("bytes 0-*/*", OFF_T_MAX, id="off-t-max"),
        pytest.param(f"bytes {2**64}-*/*", 1, id="wraps-to-0-in-uint64"),
        pytest.param(f"bytes {2**64}-{2**64 + 5}/*", 6, id="wraps-to-0-5-in-uint64"),
        pytest.param("bytes " + "9" * 5000 + "-*/*", 1, id="5000-digits"),
    ],
)
def test_a_body_outside_the_image_says_the_size(header: str, length: int) -> None:
    with pytest.raises(RangeOutsideImage) as failure:
        parse_content_range(header, length).resolve(SIZE)

    assert failure.value.size == SIZE


@pytest.mark.parametrize("size", [0, 99, 101])
def test_a_client_that_believes_in_another_size_is_refused(size: int) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_content_range(f"bytes 0-9/{size}", 10).resolve(SIZE)

    assert failure.value.message == f"Content-Range size ({size}) must equal image size (100)"


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(0, 64),
    first=st.integers(0, 80),
    length=st.integers(1, 80),
    last_is_said=st.booleans(),
    size_is_said=st.booleans(),
)
@example(size=10, first=3, length=7, last_is_said=True, size_is_said=True)
def test_any_body_lies_where_it_says_or_is_refused(
    size: int, first: int, length: int, last_is_said: bool, size_is_said: bool
) -> None:
    last = str(first + length - 1) if last_is_said else "*"
    header = f"bytes {first}-{last}/{size if size_is_said else '*'}"
    wanted = parse_content_range(header, length)

    if first + length <= size:
        assert wanted.resolve(size) == Span(first, first + length, size)
    else:
        with pytest.raises(RangeOutsideImage):
            wanted.resolve(size)


@settings(max_examples=200, deadline=None)
@given(header=st.text(alphabet="bytes -/*0159\u0660", max_size=16) | st.text(max_size=16))
def test_any_text_is_parsed_or_refused(header: str) -> None:
    try:
        parsed = parse_content_range(header, 1)
    except BadRequest:
        return

    assert parsed.length == 1
