# SPDX-License-Identifier: Apache-2.0
"""conf/imageserver.env is what the settings declare, and changes none of them.

When the first of these fails: ``imageserver config sample > conf/imageserver.env``.
"""

from dataclasses import fields
from pathlib import Path

import pytest

from imageserver.__main__ import share_command
from imageserver.server.commandline import main
from imageserver.settings import Settings, variable_of

SAMPLE = Path(__file__).parents[3] / "conf" / "imageserver.env"


def test_the_file_is_what_the_settings_declare(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(share_command(), ["config", "sample"]) == 0
    assert capsys.readouterr().out == SAMPLE.read_text(encoding="utf-8")


def test_the_file_sets_nothing() -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()

    assert [line for line in lines if line and not line.startswith("#")] == []


def test_every_setting_is_there_with_its_default() -> None:
    lines = SAMPLE.read_text(encoding="utf-8").splitlines()
    declared = dict(line[1:].split("=", 1) for line in lines if line.startswith("#IMAGESERVER_"))

    assert list(declared) == [variable_of(field.name) for field in fields(Settings)]
    assert Settings.from_environ(declared) == Settings()


def test_a_sample_is_printed_even_where_the_settings_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMAGESERVER_WORKERS", "many")

    assert main(share_command(), ["config", "sample"]) == 0
    assert "\n# Image reads at once, over all workers\n#IMAGESERVER_MAX_READERS=8\n" in (
        capsys.readouterr().out
    )
