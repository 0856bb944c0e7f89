# SPDX-License-Identifier: Apache-2.0
"""Where the log goes: once to standard error, with a time stamp unless the journal has its own."""

import re
import subprocess
import sys

import pytest

_SCRIPT = """
import logging, os, sys
from imageserver import logs
for level in sys.argv[1:]:
    logs.configure(level)
logging.getLogger("imageserver.web").info("hello")
logging.getLogger("imageserver.web").warning("careful")
logging.getLogger("elsewhere").warning("not ours")
"""
_STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] "


def _log(*levels: str, **environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *levels],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout == ""
    return [re.sub(r"\[\d+\] ", "[pid] ", line) for line in done.stderr.splitlines()]


def test_a_line_has_a_time_a_process_and_a_level() -> None:
    lines = _log("warning")

    assert re.fullmatch(_STAMP + re.escape("[pid] [WARNING] careful"), lines[0])


def test_the_journal_gets_no_time_stamps() -> None:
    lines = _log("info", JOURNAL_STREAM="9:12345")

    assert lines == ["[pid] [INFO] hello", "[pid] [WARNING] careful", "not ours"]


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        pytest.param(["debug"], ["hello", "careful"], id="debug"),
        pytest.param(["warning"], ["careful"], id="warning"),
        pytest.param(["error"], [], id="error"),
        pytest.param(["info", "warning"], ["careful"], id="raised-by-a-second-call"),
        pytest.param(["error", "info"], ["hello", "careful"], id="lowered-by-a-second-call"),
    ],
)
def test_the_last_level_counts_and_each_line_comes_once(
    levels: list[str], expected: list[str]
) -> None:
    lines = _log(*levels, JOURNAL_STREAM="9:12345")

    assert [line.rpartition("] ")[2] for line in lines] == [*expected, "not ours"]


def test_nothing_is_configured_unasked() -> None:
    assert _log(JOURNAL_STREAM="9:12345") == ["careful", "not ours"]
