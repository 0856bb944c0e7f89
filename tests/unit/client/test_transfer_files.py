# SPDX-License-Identifier: Apache-2.0
"""Transfers as files of a config directory: what the server understands, whole, and private."""

import os
import stat
from pathlib import Path

import pytest

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.table import KINDS
from imageserver.client.failures import LocalFailure
from imageserver.client.local import transfer_files
from imageserver.client.local.transfer_files import ConfigDirectory
from imageserver.core.transfer import Transfer, parse_transfer

ONE = Transfer("one", NbdImage("/s", "e", "b"), read_only=True, idle_seconds=60)
TWO = Transfer("two \u00fc", FileImage("/images/a"))


def test_a_file_says_what_the_server_understands(tmp_path: Path) -> None:
    for transfer in (ONE, TWO):
        ConfigDirectory(str(tmp_path)).add(transfer)
        text = (tmp_path / transfer.id).read_bytes()
        assert parse_transfer(transfer.id, text, KINDS) == transfer
    assert sorted(os.listdir(tmp_path)) == ["one", "two \u00fc"]


@pytest.mark.parametrize(("directory", "file"), [(0o700, 0o600), (0o2750, 0o640)])
def test_a_file_is_private_or_the_groups_that_a_directory_hands_on(
    tmp_path: Path, directory: int, file: int
) -> None:
    tmp_path.chmod(directory)
    before = os.umask(0o000)
    try:
        ConfigDirectory(str(tmp_path)).add(ONE)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == file


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    place = ConfigDirectory(str(tmp_path))
    place.add(ONE)
    with (tmp_path / "one").open("rb") as old:
        place.add(Transfer("one", FileImage("/b")))
        assert parse_transfer("one", old.read(), KINDS) == ONE
    assert place.list() == [Transfer("one", FileImage("/b"))]


def test_what_cannot_be_renamed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(LocalFailure, match=r"cannot write .*: Is a directory"):
        ConfigDirectory(str(tmp_path)).add(ONE)
    assert os.listdir(tmp_path) == ["one"]


def test_a_list_has_what_counts_in_order_and_says_why_the_rest_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = ConfigDirectory(str(tmp_path))
    for transfer in (TWO, ONE):
        place.add(transfer)
    (tmp_path / "a directory").mkdir()
    (tmp_path / "no json").write_text("{")
    (tmp_path / "large").write_text(" " * (1 << 20))
    (tmp_path / "link").symlink_to("one")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / os.fsdecode(b"\xff")).write_bytes((tmp_path / "one").read_bytes())
    (tmp_path / ".imagectl-0").write_bytes((tmp_path / "one").read_bytes())
    (tmp_path / "open").write_bytes((tmp_path / "one").read_bytes())
    (tmp_path / "open").chmod(0o620)

    assert place.list() == [ONE, TWO]

    said = [record.getMessage().removeprefix("imagectl: ") for record in caplog.records]
    assert said == [
        f"'{tmp_path}/{name}' does not count: {problem}"
        for name, problem in (
            ("a directory", "not a regular file"),
            ("fifo", "not a regular file"),
            ("large", "larger than 65536 bytes"),
            ("link", "is a symbolic link"),
            ("no json", said[4].partition("count: ")[2]),
            ("open", "can be written by group or others (mode 0620)"),
        )
    ]


def test_a_file_of_another_owner_is_listed_with_what_it_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ConfigDirectory(str(tmp_path))
    place.add(ONE)
    real = os.stat

    def owned_by_4711(path: str) -> os.stat_result:
        fields = list(real(path))
        fields[stat.ST_UID] = 4711
        return os.stat_result(fields)

    monkeypatch.setattr(os, "stat", owned_by_4711)
    monkeypatch.setattr(transfer_files, "_ROOT", 4712)

    assert place.list() == [ONE]
    (record,) = caplog.records
    assert f"counts only for a server of its owner, uid {os.geteuid()}," in record.getMessage()


def test_a_directory_that_others_may_write_has_none_that_count(tmp_path: Path) -> None:
    place = ConfigDirectory(str(tmp_path))
    place.add(ONE)
    tmp_path.chmod(0o777)

    with pytest.raises(LocalFailure, match=r"it can be written by group or others .mode 0777.$"):
        place.list()


def test_a_file_is_removed_and_one_that_is_not_there_is_fine(tmp_path: Path) -> None:
    place = ConfigDirectory(str(tmp_path))
    place.add(ONE)
    for _ in range(2):
        place.remove("one")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    place = ConfigDirectory(str(tmp_path / "none"))
    for use in (lambda: place.add(ONE), place.list):
        with pytest.raises(LocalFailure, match=r"none: No such file or directory"):
            use()
