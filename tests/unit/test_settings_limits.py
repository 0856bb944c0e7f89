# SPDX-License-Identifier: Apache-2.0
"""Limits per image, as the settings have them."""

import pytest

from imageserver.settings import InvalidSetting, Settings

SETTINGS = pytest.mark.parametrize("name", ["max_readers_per_image", "max_writers_per_image"])


def read(name: str, text: str) -> Settings:
    return Settings.from_environ({f"IMAGESERVER_{name.upper()}": text})


@SETTINGS
@pytest.mark.parametrize(
    ("text", "value", "shown"), [("4", 4, "4"), ("256", 256, "256"), ("None", None, "none")]
)
def test_a_limit_is_a_number_or_none(name: str, text: str, value: int | None, shown: str) -> None:
    found = read(name, text)

    assert (getattr(found, name), found.text(name)) == (value, shown)


@SETTINGS
@pytest.mark.parametrize("text", ["0", "-1", "513", "no", "4,4"])
def test_another_text_is_refused(name: str, text: str) -> None:
    with pytest.raises(InvalidSetting, match=r"must be a whole number from 1 to \d+, or none"):
        read(name, text)


def test_there_is_none_unless_one_is_set() -> None:
    found = Settings()

    assert (found.max_readers_per_image, found.max_writers_per_image) == (None, None)
    assert (found.readers_of_image, found.writers_of_image) == (8, 1)


def test_the_smaller_of_limit_and_total_counts_for_an_image() -> None:
    found = Settings(max_readers=64, max_readers_per_image=4, max_writers_per_image=4)

    assert (found.readers_of_image, found.writers_of_image) == (4, 1)
