# SPDX-License-Identifier: Apache-2.0
"""The runtime directory under a server: the one that was opened, or none."""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.core.errors import StateUnavailable
from imageserver.runtime.directory import RuntimeDirectory, runtime_in
from imageserver.runtime.pathclaim import PathClaim
from imageserver.runtime.private import UnusableDirectory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def runtime(path: Path) -> Iterator[RuntimeDirectory]:
    runtime = RuntimeDirectory(str(path))
    yield runtime
    runtime.close()


def test_everything_is_made_once(path: Path, runtime: RuntimeDirectory) -> None:
    runtime.prepare()
    runtime.prepare()

    assert sorted(os.listdir(path)) == ["activity", "locks", "metrics", "registered"]
    assert {entry.stat().st_mode & 0o7777 for entry in path.iterdir()} == {0o700}
    assert runtime.problem() == ""


def test_what_is_not_ours_alone_is_not_opened(path: Path, runtime: RuntimeDirectory) -> None:
    path.mkdir(0o700)
    (path / "locks").mkdir(0o700)
    (path / "locks").chmod(0o770)

    with pytest.raises(UnusableDirectory, match="/locks has mode 0770"):
        runtime.prepare()


@pytest.mark.parametrize("name", ["", "locks", "registered", "activity", "metrics"])
def test_cleaners_find_each_directory_locked(
    path: Path, runtime: RuntimeDirectory, name: str
) -> None:
    """systemd-tmpfiles(8) takes flock(2) of a directory alone, or passes it over."""
    runtime.prepare()
    cleaner = os.open(path / name, os.O_RDONLY | os.O_DIRECTORY)

    with pytest.raises(BlockingIOError):
        fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    runtime.close()
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(cleaner)


def _remove(path: Path) -> None:
    shutil.rmtree(path)


def _replace(path: Path) -> None:
    path.rename(path.with_name(path.name + ".old"))
    path.mkdir(0o700)


def _link(path: Path) -> None:
    old = path.rename(path.with_name(path.name + ".old"))
    path.symlink_to(old)


@pytest.mark.parametrize("spoil", [_remove, _replace, _link])
@pytest.mark.parametrize("name", ["", "locks", "registered", "activity"])
def test_what_was_removed_or_replaced_is_a_problem(
    path: Path, runtime: RuntimeDirectory, name: str, spoil: object
) -> None:
    runtime.prepare()
    spoil(path / name)  # type: ignore[operator]

    lost = runtime.problem().removesuffix(" was removed or replaced")

    assert lost == str(path / name).rstrip("/")
    directory = {"": runtime.top, "locks": runtime.locks}.get(name)
    if directory:
        with pytest.raises(StateUnavailable, match=f"^{lost} was removed or replaced$"):
            directory.require()


def test_a_directory_put_back_is_no_problem(path: Path, runtime: RuntimeDirectory) -> None:
    runtime.prepare()
    away = path.rename(path.with_name("away"))
    assert runtime.problem()
    away.rename(path)

    runtime.locks.require()
    assert runtime.problem() == ""


def test_a_change_is_logged_once(
    path: Path, runtime: RuntimeDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "imageserver.runtime.directory")
    runtime.prepare()
    runtime.watch()
    away = path.rename(path.with_name("away"))
    runtime.watch()
    runtime.watch()
    away.rename(path)
    runtime.watch()
    runtime.watch()

    told = [(record.levelname, record.getMessage().partition(";")[0]) for record in caplog.records]
    assert told == [
        ("ERROR", f"runtime directory: {path} was removed or replaced"),
        ("WARNING", f"runtime directory: {path} is in place again"),
    ]


def test_a_file_that_is_kept_is_opened_anew_after_it_was_removed(
    path: Path, runtime: RuntimeDirectory
) -> None:
    runtime.prepare()
    (path / "file").write_bytes(b"text")
    runtime.keep("file", os.open(path / "file", os.O_RDWR))
    (path / "file").unlink()

    fd = runtime.reopen("file")

    assert fd is not None
    assert (os.read(fd, 9), runtime.reopen("other")) == (b"text", None)
    os.close(fd)


def test_a_directory_that_is_not_there_cannot_be_required(runtime: RuntimeDirectory) -> None:
    with pytest.raises(StateUnavailable):
        runtime.locks.require()


def test_a_process_has_one_for_each_path(path: Path) -> None:
    assert runtime_in(str(path)) is runtime_in(str(path))


def test_the_path_of_a_server_that_has_ended_is_claimed_by_the_next_one(
    path: Path, runtime: RuntimeDirectory
) -> None:
    before = PathClaim(str(path))
    before.take()
    runtime.prepare()
    runtime.watch()
    assert not runtime.claim.take()
    before.close()

    runtime.watch()

    assert not PathClaim(str(path)).take()
