# SPDX-License-Identifier: Apache-2.0
"""docs/operations.md is true from "Tune" on: what its commands print, and what its tables name.

A shell block that has a ``text`` or ``json`` block after it is run, in the document's order, on a
server that is as its section says (operating.py). One without asks the journal and is for
test_systemd_booted.py. Other blocks are lines of a log. Numbers but 0 may be others, and lines
may come in another order.
"""

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.system.harness import ROOT, Server, nbdkit, qemu_nbd
from tests.system.operating import SIZE, World
from tests.system.test_docs_api import FENCE

_DOCUMENT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
TEXT = _DOCUMENT[_DOCUMENT.index("\n## Tune\n") :]
SECTIONS = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
NUMBER = re.compile(r"(?<![0-9a-z])[0-9]+([.][0-9]+)*(?![0-9a-z])")


class Block(NamedTuple):
    """Shell code, what it prints, or both."""

    section: str
    code: str
    shown: str


def blocks() -> list[Block]:
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(TEXT):
        section = re.findall(r"^## (.+)$", TEXT[: fence.start()], re.MULTILINE)[-1]
        if fence[1] == "sh":
            found.append(Block(section, fence[2], ""))
        elif found and TEXT[end : fence.start()].isspace() and not found[-1].shown:
            found[-1] = found[-1]._replace(shown=fence[2])
        else:
            found.append(Block(section, "", fence[2]))
        end = fence.end()
    return found


BLOCKS = blocks()
QUESTIONS = [block.code for block in BLOCKS if not block.shown]
SAMPLES = [block.shown for block in BLOCKS if not block.code]


def masked(text: str) -> list[str]:
    """Return lines without what differs from one machine to another.

    That is numbers, and a heading that newer versions of ss leave out if nothing is below it.
    """
    lines = (" ".join(line.split()).removesuffix(" Process") for line in text.splitlines())
    return sorted(
        NUMBER.sub(lambda found: "0" if found[0] == "0" else "N", line) for line in lines if line
    )


@pytest.fixture(scope="module")
def world(workplace: Path) -> Iterator[World]:
    world = World(workplace)
    with world.running():
        yield world


@pytest.mark.parametrize("section", SECTIONS)
def test_commands_print_what_the_document_shows(world: World, section: str) -> None:
    world.enter(section)
    for block in BLOCKS:
        if block.section == section and block.code and block.shown:
            shown = world.run(block.code)
            assert masked(shown) == masked(world.here(block.shown)), shown


def test_the_sample_of_the_log_is_a_line_of_it(world: World) -> None:
    (text, _) = SAMPLES
    (expected,) = masked(text)

    assert [line for line in masked(world.server.log) if line.endswith(expected)] != []


def log_in_json(workplace: Path) -> list[str]:
    """Run a server, under a journal, that meets each failure which a test can make."""
    here = workplace / "failing"
    here.mkdir()
    with (here / "disk").open("wb") as file:
        file.truncate(SIZE)
    server = Server(here, workers=1, backend_timeout=1, log_format="json")
    server.env["JOURNAL_STREAM"] = "9:12345"
    bad = ("--filter=error", "memory", "1M", "error-pread-rate=100%")
    slow = ("eval", "get_size=echo 1M", "pread=sleep 2; head -c $3 /dev/zero")
    with (
        socket.socket(socket.AF_UNIX) as dead,
        socket.socket(socket.AF_UNIX) as mute,
        qemu_nbd(here / "disk", export="vda") as disk,
        nbdkit(here / "bad", *bad) as broken,
        nbdkit(here / "slow", *slow) as silent,
        server,
    ):
        dead.bind(str(here / "dead"))
        mute.bind(str(here / "mute"))
        mute.listen()
        failing = {
            "none": {"socket": str(here / "none")},
            "dead": {"socket": str(here / "dead")},
            "vdb": {"socket": str(disk), "export": "vdb"},
            "bad": {"socket": str(broken)},
            "slow": {"socket": str(silent)},
            "file": {"backend": "file", "file": "/images/nofile"},
            "directory": {"backend": "file", "file": str(here)},
        }
        for name, fields in failing.items():
            answer = server.request("GET", server.add(name, **fields))
            assert answer.status in {500, 504}
        assert server.request("HEAD", server.add("mute", socket=str(here / "mute"))).status == 504
        named = {"Range": "bytes=0-65535", "X-Request-Id": "nightly-17"}
        disk_url = server.add("8b0e", socket=str(disk), export="vda")
        assert server.request("GET", disk_url, headers=named).status == 206
    return [re.sub(r"^<[0-9]>", "", line) for line in server.log.splitlines()]


@pytest.fixture(scope="module")
def lines(workplace: Path) -> list[str]:
    return log_in_json(workplace)


def test_the_sample_of_json_is_a_line_of_the_log(lines: list[str]) -> None:
    (_, sample) = SAMPLES
    (expected,) = masked(sample)

    assert expected in masked("\n".join(lines))


def test_each_text_of_a_failure_is_one_that_the_log_has(lines: list[str]) -> None:
    rows = TEXT[TEXT.index("| end of `detail` |") :].partition("\n\n")[0]
    documented = re.findall(r"^\| `(.+?)` \|", rows, re.MULTILINE)
    details = [masked(str(json.loads(line).get("detail", "-")))[0] for line in lines]

    assert len(documented) > 8
    # Root has every permission.
    wanted = [masked(text)[0] for text in documented if "Permission denied" not in text]
    # …: what newer versions of libnbd put there.
    ends = [re.compile(re.escape(text).replace("…", ".*") + "$") for text in wanted]
    assert [end.pattern for end in ends if not any(map(end.search, details))] == []


def test_the_question_about_json_is_answered(lines: list[str]) -> None:
    (question,) = [code for code in QUESTIONS if "jq" in code]
    ask = question.partition(" | ")[2].replace(">= 60", ">= 1")
    said = subprocess.run(
        ["bash", "-c", ask], input="\n".join(lines), capture_output=True, text=True, check=True
    )

    answers = [json.loads(line) for line in said.stdout.splitlines()]
    assert [answer[:2] for answer in answers] == [["slow", "read"], ["mute", "head"]]


@pytest.mark.parametrize("seconds", ["0.6", "6.75", "59.999999", "60.0", "61", "345.6", "3600.01"])
def test_a_minute_or_more_is_what_the_question_finds(seconds: str) -> None:
    (question,) = [code for code in QUESTIONS if "-g 'finished" in code]
    pattern = question.split("'")[1]

    found = re.search(pattern, f"finished transfer=x op=read seconds={seconds} rate=7")
    assert bool(found) == (float(seconds) >= 60)


def test_every_command_is_tried_somewhere() -> None:
    assert [code for code in QUESTIONS if not code.startswith("journalctl ")] == []
    assert len(BLOCKS) - len(QUESTIONS) > 10
