# SPDX-License-Identifier: Apache-2.0
"""What scripts/capture sees on a terminal, and where it puts it."""

import pytest
from capturing.document import UnknownBlock, blocks, filled
from capturing.terminal import Screen

DOCUMENT = "# Title\n<!-- capture one -->\nold\n<!-- end -->\nText\n"


def test_a_block_is_replaced_and_nothing_else():
    new = filled(DOCUMENT, {"one": "new\nlines\n"})
    assert new == DOCUMENT.replace("old\n", "new\nlines\n")
    assert blocks(new) == {"one": "new\nlines\n"}
    assert filled(new, {"one": "old\n"}) == DOCUMENT


@pytest.mark.parametrize("captures", [{}, {"one": "", "two": ""}])
def test_blocks_and_captures_must_match(captures: dict[str, str]):
    with pytest.raises(UnknownBlock):
        filled(DOCUMENT, captures)


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("one\r\ntwo", "one\ntwo"),
        ("10%\r\x1b[2K20%", "20%"),
        ("a\r\nb\r\n\r\x1b[1A\x1b[2K\x1b[1A\x1b[2Kc\r\n", "c"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("before\x1b[?1049h\x1b[Hfull\r\nscreen\x1b[Hnew", "new"),
        ("\x1b[?25lport :5000", "port :80"),
    ],
    ids=["lines", "erased", "up", "colour", "full", "renamed"],
)
def test_the_screen_shows_what_a_terminal_shows(written: str, seen: str):
    screen = Screen({":5000": ":80"})
    screen.feed(written)
    assert screen.text.plain.rstrip() == seen
