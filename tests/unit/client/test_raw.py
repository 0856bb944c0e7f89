# SPDX-License-Identifier: Apache-2.0
"""Raw files: their data, their holes, and zeros in what has no holes."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imageserver.client.failures import LocalFailure
from imageserver.client.local.raw import BLOCK, RawFile, nonzero
from imageserver.client.moving.file_locks import claimed
from imageserver.client.plan import MIB


@pytest.mark.parametrize("tail", [0, 1, BLOCK - 1])
@given(pattern=st.lists(st.booleans(), max_size=40))
def test_nonzero_blocks_are_found(pattern, tail):
    data = b"".join(bytes([0, wanted] * (BLOCK // 2)) for wanted in pattern) + b"x" * tail
    found = list(nonzero(data))
    assert all(start % BLOCK == 0 for start, _ in found)
    assert {
        block for start, stop in found for block in range(start // BLOCK, -(-stop // BLOCK))
    } == {
        *(number for number, wanted in enumerate(pattern) if wanted),
        *([len(pattern)] * bool(tail)),
    }
    assert not tail or found[-1][1] == len(data)


def test_a_mib_of_zeros_has_no_data():
    assert list(nonzero(bytes(MIB))) == []


def test_holes_are_left_out_and_made(tmp_path: Path):
    file = RawFile.create(str(tmp_path / "image"), 4 * MIB)
    assert list(file.spans()) == []
    file.write(MIB, b"x" * MIB)
    file.write(3 * MIB, b"y" * BLOCK)
    file.sync()
    assert list(file.spans()) == [(MIB, 2 * MIB), (3 * MIB, 3 * MIB + BLOCK)]
    file.zero(MIB, 2 * MIB)
    assert list(file.spans()) == [(3 * MIB, 3 * MIB + BLOCK)]
    assert file.read(3 * MIB - 1, 2) == b"\0y"
    file.close()
    file.close()


def test_a_file_that_tells_no_length_is_refused():
    with pytest.raises(LocalFailure, match="/proc/version: Invalid argument"):
        RawFile.open("/proc/version")


def test_a_sync_that_has_failed_fails_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The kernel says once that pages are lost."""
    file = RawFile.create(str(tmp_path / "image"), MIB)

    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(LocalFailure, match="Input/output error"):
        file.sync()
    monkeypatch.undo()
    with pytest.raises(LocalFailure, match="what was written before is lost"):
        file.sync()
    file.close()


def test_an_existing_file_is_opened_as_it_is(tmp_path: Path):
    (tmp_path / "image").write_bytes(b"abc")
    file = RawFile.open(str(tmp_path / "image"))
    assert (file.size, file.read(1, 2)) == (3, b"bc")
    with pytest.raises(LocalFailure, match="has become shorter than 3 bytes"):
        file.read(2, 2)
    file.close()


def test_a_file_that_is_cut_while_its_holes_are_looked_for_has_none_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "image").write_bytes(b"x" * MIB)
    file = RawFile.open(str(tmp_path / "image"))
    seek = os.lseek

    def late(fd: int, position: int, how: int) -> int:
        os.truncate(tmp_path / "image", 0)
        return seek(fd, position, how)

    monkeypatch.setattr(os, "lseek", late)
    with pytest.raises(LocalFailure, match=f"has become shorter than {MIB} bytes"):
        file.spans()
    file.close()


def test_a_fifo_keeps_nobody_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(LocalFailure, match="fifo is neither a file nor a block device"):
        RawFile.open(str(tmp_path / "fifo"))


def test_a_file_that_was_put_in_anothers_place_is_not_written(tmp_path: Path):
    for name in ("ours", "others"):
        (tmp_path / name).write_bytes(b"data")
    ours, others = (tmp_path / "ours").stat(), str(tmp_path / "others")
    for attempt in (
        lambda: RawFile.create(others, 2, ours),
        lambda: RawFile.open(others, writable=True, ours=ours),
    ):
        with pytest.raises(LocalFailure, match="was replaced by another file meanwhile"):
            attempt()
    assert (tmp_path / "others").read_bytes() == b"data"


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty, from an earlier run"])
def test_a_file_system_without_locks_is_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
):
    part = tmp_path / "image.part"
    if is_there:
        part.touch()

    def lockless(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", lockless)
    with pytest.raises(LocalFailure) as raised, claimed(str(part), is_part=True):
        pass
    assert str(raised.value) == f"{part} cannot be locked where it lies: No locks available"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["missing", "."])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, path: str):
    with pytest.raises(LocalFailure, match=path):
        RawFile.open(str(tmp_path / path))


def test_a_part_that_is_renamed_before_it_is_locked_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    part, file = tmp_path / "image.part", tmp_path / "image"
    lock = fcntl.flock
    with contextlib.ExitStack() as first:
        first.enter_context(claimed(str(part), is_part=True))
        part.write_text("whole")

        def late(fd: int, operation: int) -> None:
            """Lock what was opened before the first download ended."""
            if part.exists() and not file.exists():
                part.rename(file)
                first.close()
            lock(fd, operation)

        monkeypatch.setattr(fcntl, "flock", late)
        with claimed(str(part), is_part=True) as claim:
            claim.require()
            assert (part.read_text(), file.read_text()) == ("", "whole")
            with pytest.raises(LocalFailure, match="another download of this file is running"):
                first.enter_context(claimed(str(part), is_part=True))
            part.rename(tmp_path / "elsewhere")
            part.touch()
            with pytest.raises(LocalFailure, match="was replaced by another file meanwhile"):
                claim.require()
    assert file.read_text() == "whole"
