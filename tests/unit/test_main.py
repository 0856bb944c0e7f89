# SPDX-License-Identifier: Apache-2.0
"""The ``imageserver`` command, as far as nothing is served."""

import argparse
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest

from imageserver import __version__
from imageserver.__main__ import share_command
from imageserver.server import commandline as cli
from imageserver.settings import Settings, flag_of

main = partial(cli.main, share_command())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Return with which settings a server would have been started."""
    found: list[Settings] = []

    class Application:
        def __init__(self, settings: Settings) -> None:
            found.append(settings)

        def run(self) -> None:
            pass

    monkeypatch.setattr(cli, "ImageApplication", Application)
    return found


def test_a_flag_wins_over_its_variable_even_over_a_wrong_one(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGESERVER_WORKERS", "many")
    monkeypatch.setenv("IMAGESERVER_MAX_READERS", "3")

    assert main(["serve", "--workers", "5", "--config-dir=/somewhere"]) == 0

    (settings,) = served
    assert (settings.workers, settings.max_readers, settings.config_dir) == (5, 3, "/somewhere")


def test_every_setting_is_a_flag(served: list[Settings]) -> None:
    values = {field.name: Settings().text(field.name) for field in fields(Settings)}
    flags = [f"{flag_of(name)}={value}" for name, value in values.items() if value]

    main(["serve", *flags])

    assert served == [Settings()]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--workers=0"], "--workers='0' is wrong: it must be a whole number from 1 to "),
        (["serve", "--config-dir="], "--config-dir='' is wrong: it must be an absolute path"),
        (["check", "--bind=nowhere"], "--bind='nowhere' is wrong: it must be HOST:PORT"),
    ],
)
def test_a_wrong_flag_is_a_sentence_that_names_it(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)

    assert str(raised.value).startswith(f"imageserver: {said}")


@pytest.mark.parametrize(
    "words",
    [
        ["bogus"],
        ["serve", "--wrokers", "3"],
        ["serve", "--work", "3"],
        ["serve", "--workers"],
        ["config"],
        ["config", "sample", "--workers", "3"],
        ["--check", "--show-config"],
        ["--check", "serve"],
        ["--port", "1", "serve"],
        ["--port", "1", "--check"],
        ["--port", "many"],
        ["--tls-enabled"],
    ],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_is_one_sentence_and_serves_nothing(
    served: list[Settings], capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(words)

    (line,) = capsys.readouterr().err.splitlines()
    assert (raised.value.code, served) == (2, [])
    assert line.startswith("imageserver: ")
    assert line.endswith(" --help.")


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["share", "disk.raw", "--read"], "imageserver share"),
        (["config", "sample", "--workers", "3"], "imageserver config sample"),
        (["--bogus", "check"], "imageserver"),
    ],
)
def test_an_unknown_flag_leads_to_the_help_of_its_command(
    capsys: pytest.CaptureFixture[str], words: list[str], command: str
) -> None:
    with pytest.raises(SystemExit):
        main(words)

    said = capsys.readouterr().err
    assert said.startswith("imageserver: unrecognized arguments: --")
    assert said.endswith(f"; see {command} --help.\n")


def test_the_words_of_cloudstacks_agent_serve_with_what_it_expects(
    served: list[Settings], tmp_path: Path
) -> None:
    control = tmp_path / "run" / "control.sock"
    words = ["--listen", "127.0.0.1", "--port", "54322", "--control-socket", str(control)]

    assert main(words) == 0

    (settings,) = served
    assert (settings.bind, settings.control_socket) == (("127.0.0.1:54322",), str(control))
    assert settings.unregister_timeout == 4
    assert (tmp_path / "run" / "control" / "transfers").is_dir()


def test_what_that_agent_would_get_is_shown_and_nothing_made(
    served: list[Settings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = tmp_path / "run" / "control.sock"

    assert main(["--show-config", "--control-socket", str(control)]) == 0
    assert f"IMAGESERVER_RUNTIME_DIR={tmp_path}/run/control/state\n" in capsys.readouterr().out
    assert (served, list(tmp_path.iterdir())) == ([], [])


def test_no_words_at_all_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("usage: imageserver ")


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--version"])

    assert (raised.value.code, capsys.readouterr().out) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("flag", "command"),
    [
        ("--check", ["check"]),
        ("--show-config", ["config", "show"]),
        ("--sample-config", ["config", "sample"]),
    ],
)
def test_the_older_flags_do_what_the_commands_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    command: list[str],
) -> None:
    monkeypatch.setenv("IMAGESERVER_CONFIG_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("IMAGESERVER_RUNTIME_DIR", str(tmp_path / "run"))

    assert main([flag]) == 0
    older = capsys.readouterr().out
    assert main(command) == 0
    assert capsys.readouterr().out == older != ""


def test_what_is_shown_is_what_the_flags_make_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--max-writers", "4"]) == 0
    assert "IMAGESERVER_MAX_WRITERS=4\n" in capsys.readouterr().out


def test_the_help_of_each_command_names_every_setting() -> None:
    (commands,) = (
        action.choices
        for action in cli.parser(share_command())._actions
        if isinstance(action, argparse._SubParsersAction)
    )

    for name in ("serve", "check"):
        text = commands[name].format_help()
        assert [f.name for f in fields(Settings) if flag_of(f.name) not in text] == []


LOST = "imageserver: the output cannot be written: No space left on device\n"
CLOSED = "imageserver: the output cannot be written: Bad file descriptor\n"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("config sample | :", 141, ""),
        ("--version | :", 141, ""),
        ("config show >/dev/full", 1, LOST),
        ("check --help >/dev/full", 1, LOST),
        ("config >/dev/full 2>/dev/full", 2, ""),
        ("config show >&-", 1, CLOSED),
        ("check --admin-bind none >&-", 1, CLOSED),
        ("--version >&-", 1, CLOSED),
        ("config show >&- 2>&-", 1, ""),
        ("share /none/such >&-", 5, "imageserver: /none/such: No such file or directory.\n"),
    ],
)
def test_an_answer_that_cannot_be_written_is_a_sentence_or_a_status(
    words: str, status: int, said: str
) -> None:
    text = f"{sys.executable} -m imageserver {words}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)
