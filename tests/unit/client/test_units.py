# SPDX-License-Identifier: Apache-2.0
"""Numbers for people: short, and never nothing or all where it is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.showing.units import rate_text, share_text, size_text, time_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1280, "1.25 KiB"),
        (1536 << 10, "1.5 MiB"),
        (20 << 30, "20 GiB"),
        (int(20.25 * 2**30), "20.2 GiB"),
        (int(200.25 * 2**30), "200 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 63, "8 EiB"),
        (1 << 80, "1048576 EiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert size_text(size) == text


@given(st.integers(0, 1 << 60))
def test_a_size_is_short(size: int) -> None:
    assert len(size_text(size)) <= 8


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "0 %"),
        (0, 5, "0 %"),
        (5, 5, "100 %"),
        (1, 1 << 40, "<0.1 %"),
        ((1 << 40) - 1, 1 << 40, ">99.9 %"),
        (1, 3, "33.3 %"),
    ],
)
def test_shares(part: int, whole: int, text: str) -> None:
    assert share_text(part, whole) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (3599.6, "1:00 h"),
        (7620, "2:07 h"),
    ],
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_rates() -> None:
    assert rate_text(1.5 * 2**20) == "1.5 MiB/s"
