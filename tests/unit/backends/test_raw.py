# SPDX-License-Identifier: Apache-2.0
"""Files that are disks: the right bytes, zeros and extents, and no byte that is made up."""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imageserver.backends.file import holes, raw, zeroing
from imageserver.backends.file.kind import RAW, FileImage
from imageserver.backends.file.raw import RawFile, RawFiles
from imageserver.core.errors import FileAccessError, NoSpace, ShortBody
from imageserver.core.ports import Intent
from tests.unit.backends.raws import BLOCK, CHANGES, OLD, SIZE, open_raw
from tests.unit.fakes import Bytes
from tests.unit.shortages import open_descriptors

KIB = 1024
TIB = 1 << 40

#: Within a block, over edges, all; short and long.
SPANS = [(0, 1), (4095, 2), (BLOCK, BLOCK), (5000, 30_000), (SIZE - 1, 1), (0, SIZE), (7, 0)]
spans = pytest.mark.parametrize(("start", "length"), SPANS)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.write_bytes(OLD)
    return disk


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert [each for each in threading.enumerate() if each.name == "image"] == []
    assert open_descriptors() <= before


def _allocated(disk: Path) -> int:
    os.sync()
    return disk.stat().st_blocks * 512


@spans
def test_a_range_is_read_exactly(disk: Path, start: int, length: int) -> None:
    with open_raw(disk, Intent.READ) as opened:
        assert opened.size == SIZE
        assert b"".join(map(bytes, opened.read(start, length))) == OLD[start : start + length]


@spans
@pytest.mark.parametrize("piece", [100, 1 << 20], ids=["dripping", "at once"])
def test_a_range_is_written_and_nothing_else(
    disk: Path, start: int, length: int, piece: int
) -> None:
    new = bytes(b ^ 0xFF for b in OLD[start : start + length])
    with open_raw(disk) as opened:
        totals = list(opened.write(start, length, Bytes(new, piece)))

    assert totals == sorted(set(totals))
    assert totals[-1:] == [length][: bool(length)]
    assert disk.read_bytes() == OLD[:start] + new + OLD[start + length :]


@pytest.mark.parametrize("length", [100, 5 * BLOCK], ids=["short", "long"])
def test_a_body_that_ends_early_says_where(disk: Path, length: int) -> None:
    with open_raw(disk) as opened, pytest.raises(ShortBody) as error:
        list(opened.write(BLOCK, length, Bytes(bytes(length - 1), KIB)))

    assert error.value.received == length - 1
    assert disk.read_bytes()[:BLOCK] == OLD[:BLOCK]
    assert disk.read_bytes()[BLOCK + length :] == OLD[BLOCK + length :]


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_a_full_disk_is_told_and_nothing_staysopen_raw(
    disk: Path, change: Callable[[RawFile], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(zeroing, "_fallocate", full)

    with open_raw(disk) as opened, pytest.raises(NoSpace):
        change(opened)


@spans
@pytest.mark.parametrize("is_device", [False, True], ids=["file", "device"])
@pytest.mark.parametrize("ways", [2, 1, 0], ids=["punched", "zero range", "written"])
def test_a_range_is_zeroed_and_nothing_else(
    disk: Path, start: int, length: int, ways: int, is_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many ways of fallocate(2) there are; a device's are for whole blocks only."""
    calls: list[tuple[int, int, int]] = []

    def fallocate(fd: int, mode: int, start: int, length: int) -> None:
        if (mode == 0x03) > (ways == 2) or not ways:
            raise zeroing._Cannot
        calls.append((mode, start, length))
        os.pwrite(fd, bytes(length), start)

    monkeypatch.setattr(zeroing, "_fallocate", fallocate)
    with open_raw(disk) as opened:
        opened._is_device = is_device
        totals = list(opened.zero(start, length))

    assert totals[-1:] == [length][: bool(length)]
    assert totals == sorted(totals)
    assert disk.read_bytes() == OLD[:start] + bytes(length) + OLD[start + length :]
    assert {mode for mode, _, _ in calls} <= {0x03 if ways == 2 else 0x11}
    if is_device:
        assert not [call for call in calls if call[1] % BLOCK or call[2] % BLOCK]


def test_zeroing_gives_blocks_back_or_keeps_them_as_the_transfer_says(disk: Path) -> None:
    whole = _allocated(disk)
    with open_raw(disk, sparse=False) as opened:
        list(opened.zero(0, SIZE))
    assert disk.read_bytes() == bytes(SIZE)
    assert _allocated(disk) >= whole

    with open_raw(disk) as opened:
        list(opened.zero(0, SIZE))
    assert disk.read_bytes() == bytes(SIZE)
    assert _allocated(disk) < whole // 4


@pytest.mark.parametrize("is_allowed", [True, False], ids=["allowed", "forbidden"])
def test_a_file_has_other_times_before_a_byte_of_it_is_zeroed(
    disk: Path, is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... or its ETag would still name the old bytes: tmpfs sets the times at the end."""
    seen, utime = [], os.utime

    def forget() -> None:
        utime(disk, ns=(0, 0))

    def fallocate(fd: int, *_: int) -> None:
        seen.append(os.fstat(fd).st_mtime_ns)
        forget()

    def refuse(_fd: int) -> None:
        raise PermissionError

    monkeypatch.setattr(zeroing, "_fallocate", fallocate)
    monkeypatch.setattr(zeroing, "_FIRST_STEP", BLOCK)
    if not is_allowed:
        monkeypatch.setattr(os, "utime", refuse)
    forget()
    with open_raw(disk) as opened:
        assert list(opened.zero(0, SIZE))[-1] == SIZE

    assert len(seen) > 1
    assert (min(seen) > 0) is is_allowed


def test_steps_grow_while_the_file_system_is_quick_and_shrink_when_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, steps = 0.0, []

    def fallocate(_fd: int, _mode: int, _start: int, length: int) -> None:
        nonlocal now
        steps.append(length)
        now += 2.0 if length > TIB // 4 else 0.1

    monkeypatch.setattr(zeroing, "_fallocate", fallocate)
    monkeypatch.setattr(time, "monotonic", lambda: now)

    assert list(zeroing.zero(-1, 0, 16 * TIB, print, is_device=False, keeps=False))[-1] == 16 * TIB
    assert steps[0] == 64 << 20
    assert max(steps) == TIB // 2
    assert len(steps) < 100


def test_a_client_that_has_gone_ends_zeroing(disk: Path) -> None:
    def gone() -> None:
        raise InterruptedError

    opened = RawFiles(BLOCK).open(FileImage(str(disk), raw=True), Intent.WRITE, gone)
    with closing(opened), pytest.raises(FileAccessError):
        list(opened.zero(0, SIZE))


def _layout(disk: Path) -> None:
    """Make a file of data in the third and fourth block, and in the last, which is not whole."""
    disk.write_bytes(b"")
    os.truncate(disk, SIZE)
    with disk.open("r+b") as file:
        os.pwrite(file.fileno(), OLD[: 2 * BLOCK], 2 * BLOCK)
        os.pwrite(file.fileno(), b"x", SIZE - 1)


@pytest.mark.parametrize(
    ("start", "stop", "extents"),
    [
        (
            *(0, SIZE),
            [
                (0, 2 * BLOCK, True),
                (2 * BLOCK, 2 * BLOCK, False),
                (4 * BLOCK, 16 * BLOCK, True),
                (20 * BLOCK, 512, False),
            ],
        ),
        (100, BLOCK, [(100, BLOCK - 100, True)]),
        (2 * BLOCK + 1, 2 * BLOCK + 2, [(2 * BLOCK + 1, 1, False)]),
        (BLOCK, 3 * BLOCK, [(BLOCK, BLOCK, True), (2 * BLOCK, BLOCK, False)]),
        (SIZE - 1, SIZE, [(SIZE - 1, 1, False)]),
        (5, 5, []),
    ],
)
@pytest.mark.parametrize("dirty", [False, True], ids=["zero", "dirty"])
def test_extents_cover_the_span_and_tell_holes_from_data(
    disk: Path, start: int, stop: int, extents: list[tuple[int, int, bool]], dirty: bool
) -> None:
    _layout(disk)
    with open_raw(disk, Intent.EXTENTS) as opened:
        assert opened.dirty_bitmap is None
        listed = [each for batch in opened.extents(start, stop, dirty=dirty) for each in batch]

    assert listed == [(*extent, dirty) for extent in extents]


def test_many_extents_come_in_lists_and_are_the_same(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _layout(disk)
    with open_raw(disk, Intent.EXTENTS) as opened:
        at_once = [each for batch in opened.extents(0, SIZE, dirty=False) for each in batch]
        monkeypatch.setattr(holes, "_MOST", 1)
        batches = list(opened.extents(0, SIZE, dirty=False))

    assert len(batches) > len(at_once)
    assert [each for batch in batches for each in batch] == at_once


def test_without_an_answer_to_seek_hole_all_is_data(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _layout(disk)

    def refuse(_fd: int, _at: int, whence: int) -> int:
        raise OSError(errno.EINVAL, str(whence))

    with open_raw(disk, Intent.EXTENTS) as opened:
        monkeypatch.setattr(os, "lseek", refuse)
        assert list(opened.extents(100, SIZE, dirty=False)) == [[(100, SIZE - 100, False, False)]]


def test_16_tib_of_nothing_take_few_calls(tmp_path: Path) -> None:
    disk = tmp_path / "huge"
    with disk.open("wb") as file:
        try:
            file.truncate(16 * TIB - BLOCK)  # the most that ext4 has
        except OSError:
            file.truncate(TIB)
    with open_raw(disk) as opened:
        assert list(opened.extents(0, opened.size, dirty=False)) == [
            [(0, opened.size, True, False)]
        ]
        assert len(list(opened.zero(0, opened.size))) < 50
        opened.flush()


def test_a_flush_syncs_the_data_and_the_name(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    for intent in (Intent.FLUSH, Intent.WRITE, Intent.REPLACE):
        with open_raw(disk, intent) as opened:
            opened.flush()

    assert synced == [disk.stat().st_ino, disk.parent.stat().st_ino] * 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_what_cannot_be_opened_to_write_is_read_only(
    disk: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = raw.reopen

    def reopen(fd: int, flags: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(number, os.strerror(number))
        return really(fd, flags)

    monkeypatch.setattr(raw, "reopen", reopen)
    monkeypatch.setattr(raw, "may_write", lambda _: False)

    for intent in (Intent.WRITE, Intent.REPLACE, Intent.INSPECT):
        with open_raw(disk, intent) as opened:
            assert opened.info.read_only
            assert opened.size == SIZE


def test_a_disk_that_may_be_written_can_do_everything(disk: Path) -> None:
    for intent in Intent:
        with open_raw(disk, intent) as opened:
            told = replace(opened.info, identity=())
            assert told == replace(RAW.assumed, size=SIZE, state=told.state)
            assert opened.info.identity == (disk.stat().st_dev, disk.stat().st_ino)


@pytest.mark.parametrize("intent", Intent, ids=lambda intent: intent.name.lower())
@pytest.mark.parametrize("what", ["missing", "directory", "fifo"])
def test_what_is_no_disk_is_refused_and_not_made(tmp_path: Path, intent: Intent, what: str) -> None:
    path = tmp_path / "image"
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)

    with pytest.raises(FileAccessError):
        open_raw(path, intent)

    assert path.exists() is (what != "missing")
    if what != "missing":
        assert not stat.S_ISREG(path.stat().st_mode)
