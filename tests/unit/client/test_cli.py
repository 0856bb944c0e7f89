# SPDX-License-Identifier: Apache-2.0
"""imagectl's helps and arguments, and what its bar shows on terminals of several widths."""

import io
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from rich.console import Console

from imageserver.client.commands.cli import COMMANDS, command_contexts, imagectl
from imageserver.client.failures import BadUrl
from imageserver.client.showing.progress_bar import ProgressBar

IMAGE = "http://127.0.0.1:1/images/x"


def helps() -> Iterator[tuple[str, list[str]]]:
    """Yield each command, and the lines of its help."""
    for context in command_contexts():
        words = context.command_path.split()[1:]
        said = CliRunner().invoke(imagectl, [*words, "--help"], prog_name="imagectl").output
        yield " ".join(words), said.splitlines()


def test_every_help_fits_80_columns_and_is_whole():
    shown = dict(helps())
    wrong = [line for lines in shown.values() for line in lines if len(line) > 80 or "..." in line]

    assert {*COMMANDS, "transfer add", "transfer list", "transfer remove"} < {*shown}
    assert [line for line in wrong if not line.startswith("Usage: ")] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["download", IMAGE, "-"], "a pipe has no holes: name a FILE (a file called -: ./-)."),
        (["info", IMAGE, "--key", "k"], "--key goes with --cert."),
        (["info", IMAGE, "--timeout", "x"], "'x' is not a valid number of seconds."),
        (["map", IMAGE, "--svg", "f", "--json"], "--svg and --json exclude each other."),
        (["map", IMAGE, "--quiet"], "No such option '--quiet'."),
    ],
    ids=["a pipe", "a key alone", "no number", "two outputs", "silence that says nothing"],
)
def test_arguments_that_make_no_sense_are_told(words, sentence):
    done = CliRunner().invoke(imagectl, words)

    assert (done.exit_code, sentence in done.output) == (2, True)


def test_a_wrong_url_makes_nothing_known(tmp_path):
    place = ["--config-dir", str(tmp_path), "--url", "127.0.0.1:54323"]
    done = CliRunner().invoke(imagectl, ["transfer", "add", "--file", "f", *place])

    assert isinstance(done.exception, BadUrl)
    assert list(tmp_path.iterdir()) == []


def bar(columns: int, total: int) -> list[str]:
    """Return the lines of a bar that has ended."""
    out = io.StringIO()
    with ProgressBar(Console(file=out, width=columns)) as shown:
        shown.begin("download", total)
        shown.moved(total)
    return [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("columns", "amounts"), [(40, False), (71, False), (72, True), (120, True)]
)
def test_a_bar_is_one_line_on_any_terminal_and_leaves_room_for_ctrl_c(columns, amounts):
    (line,) = bar(columns, 600 << 20)

    assert line.startswith("download ━━━")
    assert (len(line) <= columns - 2, "100%" in line, "600.0/600.0 MiB" in line) == (
        True,
        True,
        amounts,
    )


def test_nothing_to_move_has_no_bar():
    assert bar(80, 0) == []
