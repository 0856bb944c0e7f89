# SPDX-License-Identifier: Apache-2.0
"""The manual pages are what the commands' help says.

When the first of these fails: ``scripts/man``.
"""

import argparse
import shutil
import subprocess

import manpages
import pytest
from manpages import Command, of_argparse, page, roff


@pytest.mark.parametrize("name", manpages.pages())
def test_a_page_is_what_the_help_says(name: str):
    assert (manpages.PAGES / name).read_text(encoding="utf-8") == manpages.pages()[name]


def test_there_is_no_other_page():
    assert {path.name for path in manpages.PAGES.iterdir()} == set(manpages.pages())


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("--json", "\\-\\-json"),
        (".TH", "\\&.TH"),
        ("'quoted'", "\\&'quoted'"),
        ("C:\\n", "C:\\en"),
        ("it's a . b", "it's a . b"),
    ],
)
def test_no_text_is_taken_for_a_macro(text: str, written: str):
    assert roff(text) == written


def test_a_parser_is_read_with_its_commands():
    parser = argparse.ArgumentParser(prog="toy", description="Play.", add_help=False)
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    parser.add_argument("--loud", action="store_true", help="make noise")
    commands = parser.add_subparsers()
    serve = commands.add_parser("serve", help="serve images", add_help=False)
    settings = serve.add_argument_group("settings", "Each has a variable.")
    settings.add_argument(
        "-b", "--bind", metavar="ADDRESS", help="where; not %(default)s", default=1
    )
    serve.add_argument("mode", choices=["a", "b"], help="how")

    options = [("-b, --bind ADDRESS", "Where; not 1."), ("{a,b}", "How.")]
    text = "Serve images.\n\nSettings: Each has a variable."
    child = Command("toy serve", "[OPTIONS] {a,b}", text, options, [])
    loud = [("--loud", "Make noise.")]
    assert of_argparse(parser) == Command("toy", "[OPTIONS] COMMAND", "Play.", loud, [child])


def test_man_reads_a_page_without_a_warning():
    if groff := shutil.which("groff"):  # the page is of the same macros wherever it is missing
        root = Command(
            "toy", "[OPTIONS]", "Play.\n\n\b\nas\n  is", [("-x", "X.")], [], "\b\nS:\n  0"
        )
        text = page(root, "plays", ".BR toy (2)")
        done = subprocess.run(
            [groff, "-man", "-Tutf8", "-ww"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        assert "Play." in done.stdout
