# SPDX-License-Identifier: Apache-2.0
"""imagectl's helps and arguments."""

from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from manpages import of_click

from imageserver.client.commands.cli import COMMANDS, imagectl
from imageserver.client.failures import BadUrl

IMAGE = "http://127.0.0.1:1/images/x"


def helps() -> Iterator[tuple[str, list[str]]]:
    """Yield each command, and the lines of its help."""
    for command in of_click(imagectl, None, "imagectl").walk():
        words = command.words.split()[1:]
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
        (["checksum", "f", "--block-size", "2097153"], "it must be a multiple of 4096"),
        (
            ["checksum", "f", "--algorithm", "whole-sha256", "--block-size", "1048576"],
            "whole checksums have none",
        ),
        (["checksum", IMAGE, "--format", "raw"], "--format, --backing and --force are of a FILE."),
        (["map", IMAGE, "--quiet"], "No such option '--quiet'."),
        (["transfer", "remove", "x", "--config-dir", ".", "--force"], "are for --control-socket"),
        (
            ["transfer", "remove", "x", "--config-dir", ".", "--timeout", "5"],
            "are for --control-socket",
        ),
    ],
    ids=[
        "a pipe",
        "a key alone",
        "no number",
        "two outputs",
        "an odd block",
        "a block of no use",
        "a format of no use",
        "silence that says nothing",
        "a file's requests to cut",
        "a file's requests to wait for",
    ],
)
def test_arguments_that_make_no_sense_are_told(words, sentence):
    done = CliRunner().invoke(imagectl, words)

    assert (done.exit_code, sentence in done.output) == (2, True)


def test_a_wrong_url_makes_nothing_known(tmp_path):
    place = ["--config-dir", str(tmp_path), "--url", "127.0.0.1:54323"]
    done = CliRunner().invoke(imagectl, ["transfer", "add", "--file", "f", *place])

    assert isinstance(done.exception, BadUrl)
    assert list(tmp_path.iterdir()) == []
