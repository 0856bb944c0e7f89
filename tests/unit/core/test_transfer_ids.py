# SPDX-License-Identifier: Apache-2.0
"""Ids: every one a client may ask for, and none that is more than a file's name."""

import pytest

from imageserver.core.transfer import _is_valid, is_valid_id


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("6fa459ea-ee8a-3ca4-894e-db77e160355e", id="uuid"),
        pytest.param("a", id="one-letter"),
        pytest.param(".hidden", id="leading-dot"),
        pytest.param("...", id="three-dots"),
        pytest.param("..a", id="dots-and-letter"),
        pytest.param("**", id="two-stars"),
        pytest.param("a*b", id="star-inside"),
        pytest.param(" ", id="blank"),
        pytest.param("%2e%2e", id="percent-is-a-character"),
        pytest.param("d\u00efsk \U0001f4be", id="unicode"),
        pytest.param("a" * 255, id="longest"),
    ],
)
def test_one_path_component_is_an_id(text: str) -> None:
    assert is_valid_id(text)


def test_no_id_that_is_too_long_stays_in_memory() -> None:
    before = _is_valid.cache_info().currsize
    for number in range(100):
        assert not is_valid_id(f"{number}" * 1000)

    assert _is_valid.cache_info().currsize == before


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(".", id="dot"),
        pytest.param("..", id="dots"),
        pytest.param("*", id="star"),
        pytest.param("/", id="slash"),
        pytest.param("/etc/passwd", id="absolute"),
        pytest.param("../x", id="traversal"),
        pytest.param("a/b", id="two-components"),
        pytest.param("a/", id="trailing-slash"),
        pytest.param("..\\x", id="backslash"),
        pytest.param("a\0", id="nul"),
        pytest.param("a\ufffd", id="replacement-character"),
        pytest.param("a\udc80", id="surrogate-escape"),
        pytest.param("\ud800", id="lone-surrogate"),
        pytest.param("a" * 256, id="too-long"),
        pytest.param("\u00e9" * 128, id="too-long-in-bytes"),
        pytest.param("a" * 100_000, id="very-long"),
    ],
)
def test_what_cannot_name_a_file_of_the_directory_is_no_id(text: str) -> None:
    assert not is_valid_id(text)
