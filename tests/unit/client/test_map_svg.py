# SPDX-License-Identifier: Apache-2.0
"""The drawing of an image: XML that says all it shows, and leans on nothing outside."""

import re
from xml.etree import ElementTree as ET

from imageserver.client.showing.map_cells import KIND_NAMES, Canvas
from imageserver.client.showing.map_svg import drawing

SVG = "{http://www.w3.org/2000/svg}"
PLAIN = KIND_NAMES["zero"]
MIB = 1 << 20


def painted(*pieces: tuple[int, bool, bool], cells: int = 8) -> Canvas:
    canvas = Canvas(sum(length for length, _, _ in pieces), cells)
    start = 0
    for length, zero, dirty in pieces:
        canvas.add(start, length, zero=zero, dirty=dirty)
        start += length
    return canvas


def tips(text: str) -> list[str]:
    root = ET.fromstring(text)  # noqa: S314 - our own
    return [str(group.findtext(f"{SVG}title")) for group in root.findall(f"{SVG}g")]


def test_the_whole_and_each_part_say_what_they_show() -> None:
    canvas = painted((2 * MIB, False, False), (6 * MIB, True, False))
    text = drawing("demo", canvas, 4, PLAIN)
    root = ET.fromstring(text)  # noqa: S314 - our own
    assert root.findtext(f"{SVG}title") == "demo: 8 MiB, 2 extents"
    assert root.findtext(f"{SVG}desc") == "data: 2 MiB (25.0 %); zero: 6 MiB (75.0 %)"
    assert tips(text) == [
        "0 B to 2 MiB: data 100 %",
        "2 MiB to 4 MiB: zero 100 %",
        "4 MiB to 8 MiB: zero 100 %",
    ]


def test_what_has_changed_is_told_from_the_rest() -> None:
    canvas = painted((MIB, False, True), (2 * MIB, False, False), (MIB, True, True), cells=4)
    text = drawing("demo", canvas, 4, KIND_NAMES["dirty"])
    assert tips(text) == [
        "0 B to 1 MiB: dirty data 100 %",
        "1 MiB to 3 MiB: clean data 100 %",
        "3 MiB to 4 MiB: dirty zero 100 %",
    ]
    assert [name in text for name in ("clean zero: 0 B (0 %)", "dirty data: 1 MiB (25.0 %)")] == [
        True,
        True,
    ]


def test_a_part_that_is_mixed_is_fainter_and_names_its_shares() -> None:
    text = drawing("demo", painted((1, False, False), (99, True, False), cells=1), 1, PLAIN)
    assert tips(text) == ["0 B to 100 B: data 1.0 %, zero 99.0 %"]
    assert 'class="k0"' in text
    assert 'fill-opacity="0.35"' in text


def test_an_image_of_any_name_and_none_of_any_bytes_can_be_drawn() -> None:
    text = drawing('a<b>&"c', Canvas(0, 8), 4, PLAIN)
    root = ET.fromstring(text)  # noqa: S314 - our own
    assert root.findtext(f"{SVG}title") == 'a<b>&"c: 0 B, 0 extents'


def test_nothing_is_fetched_and_nothing_runs() -> None:
    text = drawing("demo", painted((1, True, False)), 4, PLAIN)
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in text
