# SPDX-License-Identifier: Apache-2.0
"""Numbers from outside, each at the border where it comes in: bounded, whatever its length."""

from collections.abc import Callable

import falcon
import pytest
from falcon import testing

from imageserver.backends.table import KINDS
from imageserver.core.bounds import BEYOND, MAX_SIZE, cut_short
from imageserver.core.control_protocol import Unregister, parse_command
from imageserver.core.errors import BadRequest, RangeOutsideImage
from imageserver.core.patches import Zero, parse_patch
from imageserver.core.ranges import Span, parse_content_range, parse_range
from imageserver.core.transfer import parse_transfer
from imageserver.settings import InvalidSetting, Settings
from imageserver.web.headers import read_span

SIZE = 100
LARGE = [str(MAX_SIZE), str(2**63), str(2**64 - 1), str(2**64), "9" * 40, "9" * 5000]
IDS = ["2^63-1", "2^63", "2^64-1", "2^64", "40 digits", "5000 digits"]


@pytest.mark.parametrize(
    ("digits", "number"),
    [("0", 0), ("007", 7), ("0" * 5000 + "1", 1), ("9" * 40, 10**40 - 1), ("9" * 41, BEYOND)],
    ids=["zero", "leading zeros", "many of them", "40 digits", "41 digits"],
)
def test_a_number_is_exact_until_it_is_beyond_everything(digits: str, number: int) -> None:
    assert cut_short(digits) == number


def _zero(digits: str, name: str) -> Span:
    other = "offset" if name == "size" else "size"
    patch = parse_patch(f'{{"op":"zero","{name}":{digits},"{other}":1}}'.encode())
    assert isinstance(patch, Zero)
    return patch.resolve(SIZE)


def _idle(digits: str) -> int | None:
    text = f'{{"backend":"file","file":"/x","idle_timeout_seconds":{digits}}}'
    return parse_transfer("x", text.encode(), KINDS).idle_seconds


def _timeout(digits: str) -> float | None:
    command = parse_command(
        f'{{"action":"unregister","transfer_id":"x","timeout":{digits}}}'.encode(),
        KINDS,
    )
    assert isinstance(command, Unregister)
    return command.timeout


def _query(text: str) -> Span:
    wanted = read_span(falcon.Request(testing.create_environ(query_string=text)))
    assert wanted
    return wanted.resolve(SIZE)


#: Every number that comes in from outside: what a large one means.
MEANINGS: dict[str, tuple[Callable[[str], object], object]] = {
    "Range, first": (lambda d: parse_range(f"bytes={d}-").resolve(SIZE), RangeOutsideImage),
    "Range, last": (lambda d: parse_range(f"bytes=1-{d}").resolve(SIZE), Span(1, SIZE, SIZE)),
    "Range, suffix": (lambda d: parse_range(f"bytes=-{d}").resolve(SIZE), Span(0, SIZE, SIZE)),
    "Content-Range, both": (
        lambda d: parse_content_range(f"bytes {d}-{d}/*", 1).resolve(SIZE),
        RangeOutsideImage,
    ),
    "Content-Range, last": (lambda d: parse_content_range(f"bytes 0-{d}/*", 1), BadRequest),
    "Content-Range, size": (
        lambda d: parse_content_range(f"bytes 0-0/{d}", 1).resolve(SIZE),
        BadRequest,
    ),
    "zero, size": (lambda d: _zero(d, "size"), Span(1, SIZE, SIZE)),
    "zero, offset": (lambda d: _zero(d, "offset"), BadRequest),
    "zero, negative offset": (lambda d: _zero(f"-{d}", "offset"), BadRequest),
    "extents, start": (lambda d: _query(f"start={d}"), RangeOutsideImage),
    "extents, length": (lambda d: _query(f"start=1&length={d}"), Span(1, SIZE, SIZE)),
    "idle_timeout_seconds": (_idle, 2**31 - 1),
    "negative idle_timeout_seconds": (lambda d: _idle(f"-{d}"), 86400),
    "timeout": (_timeout, 31_536_000.0),
    "a setting": (
        lambda d: Settings.from_environ({"IMAGESERVER_MAX_READERS": d}),
        InvalidSetting,
    ),
    "a setting in seconds": (
        lambda d: Settings.from_environ({"IMAGESERVER_KEEPALIVE": d}),
        InvalidSetting,
    ),
    "a setting in bytes": (
        lambda d: Settings.from_environ({"IMAGESERVER_CHUNK_SIZE": d}),
        InvalidSetting,
    ),
}


@pytest.mark.parametrize("digits", LARGE, ids=IDS)
@pytest.mark.parametrize("name", MEANINGS)
def test_a_large_number_means_what_it_must(name: str, digits: str) -> None:
    parse, meaning = MEANINGS[name]
    if isinstance(meaning, type):
        with pytest.raises(meaning):
            parse(digits)
    else:
        assert parse(digits) == meaning
