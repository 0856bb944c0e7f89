# SPDX-License-Identifier: Apache-2.0
"""imagectl map and info (docs/imagectl.md): extents as a picture, and what an image can do."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.system.harness import Server, free_port
from tests.system.looking import fragmented, mixed, url_of
from tests.system.moving import IMAGECTL, MIB, imagectl

SETTINGS = {"max_writers": 2}
#: Extents of a large list, and how much memory it may take: imagectl takes 28 MiB for none, and
#: a list of so many tuples would take over 70.
COUNT = 500_000
MOST_KIB = 50 << 10


@pytest.fixture
def image(server: Server, home: Path) -> Iterator[str]:
    """The URL of 8 MiB: 1 of data, 1 of changed data, 1 that was zeroed since, 5 of zeros."""
    with mixed(server, home) as url:
        yield url


# map


def test_map_draws_data_and_zeros_in_cells(image):
    drawn = imagectl("map", "--ascii", "--width", 42, "--rows", 2, image).stdout
    assert [line.rstrip() for line in drawn.splitlines()] == [
        "8 MiB (8388608 bytes), 2 extents",
        "",
        "      0 B ################................",
        "    4 MiB ................................",
        "",
        "          one character is 128 KiB",
        "",
        "#  data  2 MiB  25.0 %  in part: - = +",
        ".  zero  6 MiB  75.0 %",
    ]


def test_map_tells_what_has_changed(image):
    drawn = imagectl(
        "map", "--ascii", "--width", 42, "--rows", 1, "--context", "dirty", image
    ).stdout
    assert [line.rstrip() for line in drawn.splitlines()] == [
        "8 MiB (8388608 bytes), 4 extents",
        "",
        "      0 B ####@@@@0000....................",
        "",
        "          one character is 256 KiB",
        "",
        "#  clean data  1 MiB  12.5 %  in part: - = +",
        ".  clean zero  5 MiB  62.5 %",
        "@  dirty data  1 MiB  12.5 %  in part: i x X",
        "0  dirty zero  1 MiB  12.5 %",
    ]


def test_map_says_so_where_there_is_no_bitmap(server, big, name):
    server.add(name, **big)
    drawn = imagectl("map", "--context", "dirty", url_of(server, name)).stdout
    assert "All of it counts as dirty: the server uses no bitmap." in drawn
    assert "█" not in imagectl("map", "--ascii", url_of(server, name)).stdout


@pytest.mark.parametrize("context", ["zero", "dirty"])
def test_map_as_json_is_what_the_server_says_and_its_totals(server, image, context):
    found = json.loads(imagectl("map", "--json", "--context", context, image).stdout)
    path = image.removeprefix(f"http://127.0.0.1:{server.port}")
    extents = server.request("GET", f"{path}/extents?context={context}").json
    totals = {
        "zero": {"data": 2 * MIB, "zero": 6 * MIB},
        "dirty": {
            "clean_data": MIB,
            "clean_zero": 5 * MIB,
            "dirty_data": MIB,
            "dirty_zero": MIB,
        },
    }[context]
    assert found == {"size": 8 * MIB, "context": context, "extents": extents} | {
        "count": len(extents),
        "totals": totals,
        **({"bitmap": "b0"} if context == "dirty" else {}),
    }


def test_map_as_svg_stands_alone_and_hides_the_id(image, home):
    assert imagectl("map", "--svg", home / "map.svg", "--title", "vda", image).stdout == ""
    text = (home / "map.svg").read_text()
    assert ET.fromstring(text).findtext("{http://www.w3.org/2000/svg}title") == (  # noqa: S314
        "vda: 8 MiB, 2 extents"
    )
    assert image.rpartition("/")[2] not in text


def test_an_image_without_extents_or_id_is_one_sentence(server, name, home):
    (home / "one").write_bytes(b"one")
    server.add(name, backend="file", file=str(home / "one"))
    for url, sentence in (
        (url_of(server, name), "no extents"),
        (url_of(server, "nobody"), "unknown image_id"),
    ):
        errors = imagectl("map", url, status=3).stderr
        assert sentence in errors
        assert errors.count("\n") == 1
    for command in ("map", "info", "check"):  # without patience: nobody waits to look
        gone = imagectl(command, f"http://127.0.0.1:{free_port()}/images/x", status=1)
        assert re.fullmatch(r"imagectl: cannot connect to .*: Connection refused\n", gone.stderr)
    unwritable = ("map", "--svg", home / "no" / "map.svg")
    assert "no extents" in imagectl(*unwritable, url_of(server, name), status=3).stderr


def peak_kib(command: list[str], output: Path) -> int:
    """Run a command to its end; return the most memory that it had."""
    peak = 0
    with output.open("wb") as file, subprocess.Popen(command, stdout=file) as started:
        status = Path(f"/proc/{started.pid}/status")
        while started.poll() is None:
            found = re.search(r"^VmHWM:\s+([0-9]+) kB$", status.read_text(), re.MULTILINE)
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.005)
    assert started.returncode == 0
    return peak


@pytest.mark.parametrize("how", ["--ascii", "--json"])
def test_half_a_million_extents_take_no_more_memory_than_few(home, how):
    with fragmented(COUNT) as url:
        assert 0 < peak_kib([*IMAGECTL, "map", how, url], home / "output") < MOST_KIB
    output = (home / "output").read_bytes()
    assert str(COUNT).encode() in output[:100] + output[-100:]


# info


def test_info_shows_size_and_abilities(image):
    shown = dict(
        re.split(r"  +", line.rstrip(), maxsplit=1)
        for line in imagectl("info", "--extents", image).stdout.splitlines()
    )
    assert shown == {
        "size": "8 MiB (8388608 bytes)",
        "features": "checksum, digest, extents, flush, qcow2, zero",
        "methods": "GET, HEAD, OPTIONS, PATCH, PUT",
        "readers": "up to 8",
        "writers": "up to 2",
        "Unix socket": "none",
        "extents": "2",
        "data": "2 MiB, 25.0 %",
        "zero": "6 MiB, 75.0 %",
    }


def test_info_as_json(server, name, home):
    (home / "one").write_bytes(b"one")
    server.add(name, backend="file", file=str(home / "one"), read_only=True)
    assert json.loads(imagectl("info", "--json", url_of(server, name)).stdout) == {
        "size": 3,
        "features": ["checksum", "flush"],
        "max_readers": 8,
        "max_writers": 0,
        "methods": ["GET", "HEAD", "OPTIONS", "POST"],
        "unix_socket": None,
    }
