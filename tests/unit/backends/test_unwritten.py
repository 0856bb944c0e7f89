# SPDX-License-Identifier: Apache-2.0
"""Preallocated files: what nobody has written is zero, whoever has read it, and nothing else is."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from imageserver.backends.file import unwritten
from imageserver.backends.file.kind import FileImage
from imageserver.backends.file.raw import RawFiles
from imageserver.core.errors import FileAccessError
from imageserver.core.extents import Extent
from imageserver.core.ports import Intent

BLOCK = 4096
#: Data lie in the first block of each step; a file system may zero a few blocks beside them.
STEP = 64 * BLOCK
STEPS = 5
EXPECTED = [
    extent
    for at in range(0, STEPS * STEP, STEP)
    for extent in ((at, BLOCK, False, False), (at + BLOCK, STEP - BLOCK, True, False))
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    """A file that is allocated, of which something was written and nothing synced."""
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(fd, 0, STEPS * STEP)
        for at in range(0, STEPS * STEP, STEP):
            os.pwrite(fd, b"x" * BLOCK, at)
        yield fd
    finally:
        os.close(fd)


def _extents(tmp_path: Path) -> list[Extent]:
    image = FileImage(str(tmp_path / "disk"), raw=True)
    with closing(RawFiles(BLOCK).open(image, Intent.EXTENTS)) as opened:
        return [each for batch in opened.extents(0, opened.size, dirty=False) for each in batch]


@pytest.mark.parametrize("most", [17, 2], ids=["at-once", "in-parts"])
def test_what_was_only_read_is_zero_and_what_was_written_is_not(
    disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(unwritten, "_MOST", most)
    os.pread(disk, STEPS * STEP, 0)

    assert _extents(tmp_path) == EXPECTED


def test_other_threads_run_while_the_disk_is_waited_for(
    disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fcntl.ioctl lets them with 1024 bytes at most."""
    sizes: list[int] = []
    ioctl = fcntl.ioctl

    def measured(fd: int, request: int, answer: bytearray) -> int:
        sizes.append(len(answer))
        return ioctl(fd, request, answer)

    monkeypatch.setattr(fcntl, "ioctl", measured)
    list(unwritten.Unwritten(disk, STEPS * STEP).cut(0, STEPS * STEP))
    assert sizes
    assert max(sizes) <= 1024


def test_what_is_written_between_two_looks_is_data_at_once(disk: int, tmp_path: Path) -> None:
    assert _extents(tmp_path) == EXPECTED
    os.pwrite(disk, b"y" * BLOCK, 32 * BLOCK)

    changed = [(BLOCK, 31 * BLOCK, True, False), (32 * BLOCK, BLOCK, False, False)]
    changed += [(33 * BLOCK, 31 * BLOCK, True, False)]
    assert _extents(tmp_path) == [EXPECTED[0], *changed, *EXPECTED[2:]]


def test_without_a_map_all_that_may_be_data_is(
    disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "")

    os.pread(disk, STEPS * STEP, 0)
    monkeypatch.setattr(fcntl, "ioctl", refuse)

    zeros = {(start, length) for start, length, zero, _ in _extents(tmp_path) if zero}
    assert zeros <= {(start, length) for start, length, zero, _ in EXPECTED if zero}


def test_what_could_not_be_written_to_the_disk_is_an_error(
    disk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(fcntl, "ioctl", fail)

    with pytest.raises(FileAccessError):
        _extents(tmp_path)
