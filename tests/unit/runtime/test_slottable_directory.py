# SPDX-License-Identifier: Apache-2.0
"""The runtime directory: ours alone, or not used."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.core import slots
from imageserver.runtime.private import (
    UnusableDirectory,
    examine_runtime,
    open_private,
    prepare_directory,
)
from imageserver.runtime.slottable import SharedTable
from tests.system.skips import needs
from tests.unit.processes import LIMITS

ME = os.geteuid()


@pytest.fixture
def table(tmp_path: Path) -> Iterator[SharedTable]:
    table = SharedTable(str(tmp_path), LIMITS)
    yield table
    table.close()


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def _state(directory: Path) -> list[tuple[Path, int, int]]:
    """Return all there is with its mode and time of change; to look changes the time of access."""
    found = [directory, *directory.rglob("*")]
    return sorted((path, path.stat().st_mode, path.stat().st_ctime_ns) for path in found)


def test_a_missing_directory_is_made_for_us_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        prepare_directory(str(tmp_path / "run"))
    finally:
        os.umask(umask)

    assert _mode(tmp_path / "run") == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o000], ids=["open", "like-tmp", "none"])
def test_a_directory_that_is_not_private_is_refused_and_left_as_it_is(
    tmp_path: Path, mode: int
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)

    for use in (prepare_directory, lambda path: examine_runtime(path, 1)):
        with pytest.raises(UnusableDirectory, match=f"has mode {mode:04o}, not 0700, and is left"):
            use(str(tmp_path / "run"))

    assert _mode(tmp_path / "run") == mode


def test_a_directory_made_under_a_strange_umask_can_be_used(tmp_path: Path) -> None:
    umask = os.umask(0o277)
    try:
        prepare_directory(str(tmp_path / "run"))
    finally:
        os.umask(umask)

    assert _mode(tmp_path / "run") == 0o700


def test_a_directory_with_files_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(0o700)
    (tmp_path / "run" / "thesis.tex").touch()
    (tmp_path / "run" / "locks").mkdir(0o700)

    with pytest.raises(UnusableDirectory, match=r"none of this server's \(thesis.tex\)"):
        examine_runtime(str(tmp_path / "run"), 1)
    (tmp_path / "run" / "slots.use").touch()  # it has been a runtime directory before
    examine_runtime(str(tmp_path / "run"), 1)


@pytest.mark.parametrize("is_there", [False, True])
def test_to_examine_changes_nothing(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "run").mkdir(0o700)
    before = _state(tmp_path)

    examine_runtime(str(tmp_path / "run"), slots.SIZE)

    assert _state(tmp_path) == before


@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_file_system_is_found_before_a_table_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    if is_there:
        (tmp_path / "run").mkdir(0o700)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(UnusableDirectory, match=r"run cannot be made or used \(No space left"):
        examine_runtime(str(tmp_path / "run"), slots.SIZE)


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o755)
    (tmp_path / "run").symlink_to("real")

    with pytest.raises(UnusableDirectory, match=f"not a directory that belongs to uid {ME}"):
        prepare_directory(str(tmp_path / "run"))
    assert _mode(tmp_path / "real") == 0o755


def test_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("nowhere")

    with pytest.raises(UnusableDirectory):
        prepare_directory(str(tmp_path / "run"))
    assert not (tmp_path / "nowhere").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()

    with pytest.raises(UnusableDirectory, match="is not a directory"):
        prepare_directory(str(tmp_path / "run"))


@needs("owners")
def test_a_directory_of_a_stranger_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(0o755)
    os.chown(tmp_path / "run", 12345, 0)

    with pytest.raises(UnusableDirectory, match=f"belongs to uid {ME}"):
        prepare_directory(str(tmp_path / "run"))
    assert _mode(tmp_path / "run") == 0o755


def test_a_directory_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "run"

    with pytest.raises(UnusableDirectory, match=r"made or used \(No such file or directory\)"):
        prepare_directory(str(path))


def test_a_private_file_is_for_us_alone(tmp_path: Path) -> None:
    os.close(open_private(str(tmp_path), "slots"))

    assert _mode(tmp_path / "slots") == 0o600


def test_a_private_file_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("text")
    (tmp_path / "slots").symlink_to("victim")

    with pytest.raises(OSError, match="symbolic links"):
        open_private(str(tmp_path), "slots")


def test_a_private_file_is_not_passed_on_to_other_programs(tmp_path: Path) -> None:
    fd = open_private(str(tmp_path), "slots")

    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_table_without_room_is_not_made(
    tmp_path: Path, table: SharedTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            table.open()

    assert os.listdir(tmp_path) == ["slots.use"]
    table.open()
    size, blocks = (tmp_path / "slots").stat().st_size, (tmp_path / "slots").stat().st_blocks
    assert (size, blocks * 512 >= size) == (slots.SIZE, True)
