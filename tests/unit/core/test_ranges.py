# SPDX-License-Identifier: Apache-2.0
"""Range headers: the exact answer for each, and any valid range is a slice of the image's bytes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imageserver.core.errors import BadRequest, RangeOutsideImage
from imageserver.core.ranges import ByteRange, Span, parse_length, parse_range, whole

OFF_T_MAX = 2**63 - 1
TIB_100 = 100 << 40


@pytest.mark.parametrize(
    ("header", "size", "start", "stop"),
    [
        pytest.param("bytes=0-0", 100, 0, 1, id="first-byte"),
        pytest.param("bytes=0-9", 100, 0, 10, id="from-the-start"),
        pytest.param("bytes=10-19", 100, 10, 20, id="middle"),
        pytest.param("bytes=99-99", 100, 99, 100, id="last-byte"),
        pytest.param("bytes=0-99", 100, 0, 100, id="all-of-it"),
        pytest.param("bytes=0-", 100, 0, 100, id="open-from-the-start"),
        pytest.param("bytes=50-", 100, 50, 100, id="open-from-the-middle"),
        pytest.param("bytes=99-", 100, 99, 100, id="open-at-the-last-byte"),
        pytest.param("bytes=0-0", 1, 0, 1, id="one-byte-image"),
        pytest.param("bytes=0-100", 100, 0, 100, id="clipped-by-one"),
        pytest.param("bytes=90-1000", 100, 90, 100, id="clipped"),
        pytest.param(f"bytes=5-{2**63 - 1}", 100, 5, 100, id="clipped-int64-max"),
        pytest.param(f"bytes=5-{2**64}", 100, 5, 100, id="clipped-over-uint64"),
        pytest.param("bytes=5-" + "9" * 5000, 100, 5, 100, id="clipped-5000-digits"),
        pytest.param("bytes=-1", 100, 99, 100, id="suffix-one"),
        pytest.param("bytes=-10", 100, 90, 100, id="suffix"),
        pytest.param("bytes=-100", 100, 0, 100, id="suffix-exactly-the-image"),
        pytest.param("bytes=-101", 100, 0, 100, id="suffix-longer-than-the-image"),
        pytest.param(f"bytes=-{2**64}", 100, 0, 100, id="suffix-over-uint64"),
        pytest.param("bytes=-" + "9" * 5000, 100, 0, 100, id="suffix-5000-digits"),
        pytest.param("bytes=007-008", 100, 7, 9, id="leading-zeros"),
        pytest.param("bytes=" + "0" * 30 + "7-" + "0" * 30 + "8", 100, 7, 9, id="many-zeros"),
        pytest.param("bytes=-0005", 100, 95, 100, id="suffix-leading-zeros"),
        pytest.param("BYTES=1-2", 100, 1, 3, id="unit-upper-case"),
        pytest.param("Bytes=1-2", 100, 1, 3, id="unit-mixed-case"),
        pytest.param(" bytes=1-2", 100, 1, 3, id="blank-before"),
        pytest.param("bytes=1-2 \t", 100, 1, 3, id="blanks-after"),
        pytest.param(f"bytes={TIB_100 - 1}-{TIB_100}", TIB_100, TIB_100 - 1, TIB_100, id="100-tib"),
        pytest.param(
            f"bytes={OFF_T_MAX - 1}-", OFF_T_MAX, OFF_T_MAX - 1, OFF_T_MAX, id="last-byte-of-off-t"
        ),
    ],
)
def test_a_satisfiable_range_is_clipped_to_the_image(
    header: str, size: int, start: int, stop: int
) -> None:
    assert parse_range(header).resolve(size) == Span(start, stop, size)


@pytest.mark.parametrize(
    ("header", "size"),
    [
        pytest.param("bytes=100-", 100, id="open-at-the-end"),
        pytest.param("bytes=100-100", 100, id="at-the-end"),
        pytest.param("bytes=101-200", 100, id="beyond-the-end"),
        pytest.param("bytes=5-4", 100, id="backwards"),
        pytest.param("bytes=99-0", 100, id="backwards-from-the-last-byte"),
        pytest.param("bytes=200-100", 100, id="backwards-beyond-the-end"),
        pytest.param("bytes=100-99", 100, id="backwards-across-the-end"),
        pytest.param("bytes=0-", 0, id="empty-image-open"),
        pytest.param("bytes=0-0", 0, id="empty-image-first-byte"),
        pytest.param("bytes=-1", 0, id="empty-image-suffix"),
        pytest.param("bytes=-" + "9" * 5000, 0, id="empty-image-huge-suffix"),
        pytest.param(f"bytes={2**63}-", 100, id="over-int64"),
        pytest.param(f"bytes={2**64}-", 100, id="wraps-to-0-in-uint64"),
        pytest.param(f"bytes={2**64}-{2**64 + 5}", 100, id="wraps-to-0-5-in-uint64"),
        pytest.param(f"bytes={2**64 + 5}-{2**64}", 100, id="backwards-over-uint64"),
        pytest.param("bytes=" + "9" * 5000 + "-", 100, id="5000-digits"),
        pytest.param("bytes=" + "9" * 5000 + "-5", 100, id="5000-digits-backwards"),
        pytest.param("bytes=" + "9" * 30 + "-", OFF_T_MAX, id="beyond-the-largest-image"),
    ],
)
def test_a_range_without_a_byte_of_the_image_says_the_size(header: str, size: int) -> None:
    with pytest.raises(RangeOutsideImage) as failure:
        parse_range(header).resolve(size)

    assert failure.value.size == size


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("", id="empty"),
        pytest.param(" ", id="blank"),
        pytest.param("bytes", id="unit-alone"),
        pytest.param("bytes=", id="nothing-after-the-unit"),
        pytest.param("bytes=-", id="dash-alone"),
        pytest.param("bytes=-0", id="suffix-zero"),
        pytest.param("bytes=-000", id="suffix-zeros"),
        pytest.param("bytes=5", id="no-dash"),
        pytest.param("0-5", id="no-unit"),
        pytest.param("=0-5", id="empty-unit"),
        pytest.param("none", id="none"),
        pytest.param("items=0-5", id="other-unit"),
        pytest.param("byte=0-5", id="unit-singular"),
        pytest.param("kbytes=0-5", id="unit-with-prefix"),
        pytest.param("bytes:0-5", id="colon"),
        pytest.param("bytes 0-5", id="blank-for-equals"),
        pytest.param("bytes 0-5/100", id="content-range"),
        pytest.param("bytes=0-5/100", id="with-size"),
        pytest.param("bytes=0-*", id="star"),
        pytest.param("bytes=0-1,3-4", id="two-ranges"),
        pytest.param("bytes=0-1, 3-4", id="two-ranges-with-blank"),
        pytest.param("bytes=0-1,-1", id="range-and-suffix"),
        pytest.param("bytes=0-1,", id="trailing-comma"),
        pytest.param("bytes=,0-1", id="leading-comma"),
        pytest.param("bytes=0-1;x=y", id="parameter"),
        pytest.param("bytes=0-1bytes=3-4", id="header-twice"),
        pytest.param("bytes=--5", id="two-dashes"),
        pytest.param("bytes=0--5", id="negative-last"),
        pytest.param("bytes=-5-", id="suffix-with-dash"),
        pytest.param("bytes=-5-10", id="negative-first"),
        pytest.param("bytes=0-5-10", id="three-numbers"),
        pytest.param("bytes=+5-", id="plus"),
        pytest.param("bytes=0-+5", id="plus-last"),
        pytest.param("bytes=-+5", id="plus-suffix"),
        pytest.param("bytes=1_0-2_0", id="underscores"),
        pytest.param("bytes=-1_0", id="underscore-suffix"),
        pytest.param("bytes=0x0-0x5", id="hexadecimal"),
        pytest.param("bytes=1e3-", id="exponent"),
        pytest.param("bytes=0.0-5", id="fraction"),
        pytest.param("bytes=a-b", id="letters"),
        pytest.param("bytes=\u0660-\u0665", id="arabic-digits"),
        pytest.param("bytes=\uff10-\uff15", id="fullwidth-digits"),
        pytest.param("bytes=\xb2-5", id="superscript-two"),
        pytest.param("bytes=-\u0665", id="arabic-suffix"),
        pytest.param("bytes= 0-5", id="blank-after-equals"),
        pytest.param("bytes =0-5", id="blank-before-equals"),
        pytest.param("bytes=0 -5", id="blank-before-dash"),
        pytest.param("bytes=0- 5", id="blank-after-dash"),
        pytest.param("bytes=- 5", id="blank-in-suffix"),
        pytest.param("bytes=0 0-5", id="blank-in-number"),
        pytest.param("bytes=0-5\n", id="newline"),
        pytest.param("bytes=0-5\r\n", id="carriage-return"),
        pytest.param("bytes=0-5\x0b", id="vertical-tab"),
        pytest.param("\xa0bytes=0-5", id="no-break-space"),
        pytest.param("bytes=0-5\0", id="nul"),
        pytest.param("Xbytes=0-5X", id="letters-around"),
        pytest.param("bytes=\u22125", id="minus-sign"),
        pytest.param("bytes=0\u20135", id="en-dash"),
        pytest.param(
            "byte\u017f=0-5",
            id="long-s-in-the-unit",
        ),
    ],
)
def test_a_malformed_range_is_refused_before_any_size_is_known(header: str) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_range(header)

    assert failure.value.message == "invalid Range header"


_NUMBERS = st.integers(0, 80) | st.integers(0, 2**70)
_ZEROS = st.sampled_from(["", "0", "000"])


@settings(max_examples=200, deadline=None)
@given(image=st.binary(max_size=64), first=_NUMBERS, last=st.none() | _NUMBERS, zeros=_ZEROS)
def test_any_range_reads_the_slice_of_the_images_bytes(
    image: bytes, first: int, last: int | None, zeros: str
) -> None:
    header = f"bytes={zeros}{first}-{'' if last is None else zeros + str(last)}"
    wanted = image[first:] if last is None else image[first : last + 1]

    assert _read(image, header) == wanted


@settings(max_examples=200, deadline=None)
@given(image=st.binary(max_size=64), suffix=_NUMBERS.filter(bool), zeros=_ZEROS)
def test_any_suffix_reads_the_tail_of_the_images_bytes(
    image: bytes, suffix: int, zeros: str
) -> None:
    assert _read(image, f"bytes=-{zeros}{suffix}") == image[-suffix:]


def _read(image: bytes, header: str) -> bytes:
    """Read as a server would; 416 counts as no bytes, which no satisfiable range may have."""
    try:
        span = parse_range(header).resolve(len(image))
    except RangeOutsideImage:
        return b""
    assert 0 <= span.start < span.stop <= span.size == len(image)
    assert span.content_range == f"bytes {span.start}-{span.stop - 1}/{len(image)}"
    return image[span.start : span.start + span.length]


@settings(max_examples=200, deadline=None)
@given(header=st.text(alphabet="bytes=-,0159 \t+_\u0660", max_size=16) | st.text(max_size=16))
def test_any_text_is_parsed_or_refused(header: str) -> None:
    try:
        parsed = parse_range(header)
    except BadRequest:
        return

    assert isinstance(parsed, ByteRange)


def test_the_whole_image_is_a_span() -> None:
    assert whole(100) == Span(0, 100, 100)


def test_the_whole_of_an_empty_image_has_no_byte() -> None:
    assert whole(0).length == 0


def test_content_range_is_inclusive() -> None:
    assert Span(10, 20, 100).content_range == "bytes 10-19/100"


@pytest.mark.parametrize(
    ("header", "length"),
    [
        pytest.param("0", 0, id="zero"),
        pytest.param("5", 5, id="plain"),
        pytest.param("0005", 5, id="leading-zeros"),
        pytest.param("0" * 5000 + "5", 5, id="5000-leading-zeros"),
        pytest.param(str(TIB_100), TIB_100, id="100-tib"),
        pytest.param(str(OFF_T_MAX), OFF_T_MAX, id="int64-max"),
        pytest.param(str(2**63), 2**63, id="over-int64"),
    ],
)
def test_a_plain_decimal_is_a_length(header: str, length: int) -> None:
    assert parse_length(header) == length


@pytest.mark.parametrize("digits", [20, 30, 5000], ids=str)
def test_a_length_of_any_digits_exceeds_every_image(digits: int) -> None:
    assert parse_length("9" * digits) > OFF_T_MAX


@pytest.mark.parametrize("header", [None, ""], ids=["none", "empty"])
def test_an_absent_length_is_required(header: str | None) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_length(header)

    assert failure.value.message == "Content-Length required"


@pytest.mark.parametrize(
    "header",
    [
        pytest.param("-1", id="negative"),
        pytest.param("+5", id="plus"),
        pytest.param("1_0", id="underscore"),
        pytest.param("5.0", id="fraction"),
        pytest.param("5e3", id="exponent"),
        pytest.param("0x5", id="hexadecimal"),
        pytest.param("five", id="letters"),
        pytest.param("5,5", id="list"),
        pytest.param("5, 5", id="list-with-blank"),
        pytest.param("5 5", id="blank-inside"),
        pytest.param(" 5", id="blank-before"),
        pytest.param("5\n", id="newline"),
        pytest.param("5\0", id="nul"),
        pytest.param("\u0665", id="arabic-digit"),
        pytest.param("\uff15", id="fullwidth-digit"),
        pytest.param("\xb2", id="superscript-two"),
    ],
)
def test_a_length_that_is_no_plain_decimal_is_invalid(header: str) -> None:
    with pytest.raises(BadRequest) as failure:
        parse_length(header)

    assert failure.value.message == "Invalid Content-Length"
