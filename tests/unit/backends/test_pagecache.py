# SPDX-License-Identifier: Apache-2.0
"""What a stream leaves in the page cache of the host."""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from imageserver.backends.file import pagecalls
from imageserver.backends.file.image import ImageFiles
from imageserver.backends.file.kind import FILE, FileImage
from imageserver.backends.file.pagecache import LEAST, WINDOW, PageCache
from imageserver.backends.file.pagecalls import find_cached
from imageserver.backends.file.raw import RawFiles
from imageserver.core.errors import FileAccessError
from imageserver.core.ports import Intent
from imageserver.core.sources import HasFileno
from tests.system.skips import needs

PAGE = os.sysconf("SC_PAGE_SIZE")
MIB = 1 << 20
SIZE = 3 * WINDOW + 5 * PAGE + 1
STEP = MIB - 7


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    fd = os.open(tmp_path_factory.mktemp("images") / "image", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, bytes(SIZE), 0)
    yield fd
    os.close(fd)


@pytest.fixture
def fd(opened: int) -> int:
    """A file on a disk, of which nothing is cached."""
    os.fsync(opened)
    os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    return opened


def cached(fd: int) -> set[int]:
    """Return the numbers of the pages that are in the cache (mincore(2))."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size) as mapped:
        pages = (ctypes.c_ubyte * -(-size // PAGE))()
        at = ctypes.c_char.from_buffer(mapped)
        assert ctypes.CDLL(None).mincore(ctypes.byref(at), ctypes.c_size_t(size), pages) == 0
        del at
    return {page for page, is_cached in enumerate(pages) if is_cached & 1}


def touch(fd: int, pages: set[int]) -> None:
    """Have the kernel cache these pages, and nothing around them."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for page in pages:
        os.pread(fd, 1, page * PAGE)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)


def read(fd: int, start: int = 0, stop: int = SIZE, *, keeps: bool = False) -> None:
    with PageCache(keeps=keeps).reading(fd, start, stop) as passage:
        for at in range(start, stop, STEP):
            os.pread(fd, min(STEP, stop - at), at)
            passage.passed(min(at + STEP, stop))


def write(fd: int, start: int = 0, stop: int = SIZE, **how: Any) -> None:
    keeps = how.pop("keeps", False)
    with PageCache(keeps=keeps).writing(fd, start, stop, **how) as passage:
        for at in range(start, stop, STEP):
            os.pwrite(fd, b"x" * min(STEP, stop - at), at)
            passage.passed(min(at + STEP, stop))


needs_cache = needs("page cache")
#: Scattered, at edges of windows, and all of a window.
SOMEBODYS = {0, 7, 8, WINDOW // PAGE - 1, WINDOW // PAGE, SIZE // PAGE} | {
    *range(2 * WINDOW // PAGE, 2 * WINDOW // PAGE + 300)
}


@needs_cache
@pytest.mark.parametrize("move", [read, write])
@pytest.mark.parametrize("span", [(0, SIZE), (WINDOW - 5, WINDOW + LEAST)])
def test_a_stream_leaves_nothing_of_its_own(
    fd: int, move: Callable[..., None], span: tuple[int, int]
) -> None:
    move(fd, *span)

    assert cached(fd) & set(range(span[0] // PAGE, -(-span[1] // PAGE))) == set()


@needs_cache
@pytest.mark.parametrize("move", [read, write])
@pytest.mark.parametrize("has_cachestat", [True, False])
def test_what_was_cached_before_stays_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, fd: int, move: Callable[..., None], *, has_cachestat: bool
) -> None:
    if not has_cachestat:
        monkeypatch.setattr(pagecalls, "_cachestat", lambda *_: None)
    touch(fd, SOMEBODYS)
    before = cached(fd)
    assert before >= SOMEBODYS

    move(fd)

    assert cached(fd) == before


@needs_cache
@pytest.mark.parametrize("move", [read, write])
def test_short_streams_and_those_of_hosts_that_want_it_stay(
    fd: int, move: Callable[..., None]
) -> None:
    move(fd, 0, LEAST - 1)
    assert len(cached(fd)) >= LEAST // PAGE
    move(fd, keeps=True)
    assert len(cached(fd)) == SIZE // PAGE + 1


@needs_cache
def test_a_stream_that_is_given_up_leaves_nothing_either(fd: int) -> None:
    with PageCache().reading(fd, 0, SIZE) as passage:
        os.pread(fd, WINDOW + MIB, 0)
        passage.passed(WINDOW + MIB)

    # What the kernel is reading ahead at that moment cannot be dropped.
    assert cached(fd) & set(range((WINDOW + MIB) // PAGE)) == set()


@needs_cache
def test_what_the_kernel_does_not_tell_is_taken_for_cached(
    monkeypatch: pytest.MonkeyPatch, fd: int
) -> None:
    monkeypatch.setattr(pagecalls, "_cachestat", lambda *_: None)
    monkeypatch.setattr(pagecalls, "_may_ask", lambda _: False)

    assert find_cached(fd, 0, WINDOW) is None
    read(fd)
    assert len(cached(fd)) == SIZE // PAGE + 1


@needs_cache
def test_what_is_read_ahead_of_a_range_is_dropped_behind_the_next_one(fd: int) -> None:
    pages = PageCache()
    with pages.reading(fd, 0, WINDOW) as passage:
        touch(fd, {*range(WINDOW // PAGE, WINDOW // PAGE + 30)})  # as the kernel does
        passage.passed(WINDOW)
    assert len(cached(fd)) == 30
    with pages.reading(fd, WINDOW, 2 * WINDOW) as passage:
        passage.passed(2 * WINDOW)
    assert cached(fd) == set()


#: sync_file_range(2): begins to write; waits until all is written.
BEGINS, WAITS = 2, 7


class Calls:
    """Stands in for the C library: what sync_file_range is told, and what it says.

    ``numbers``: what calls fail with, in turn, the last one for ever; ``flags``: only these calls.
    """

    def __init__(self, *numbers: int, flags: int | None = None) -> None:
        self.told: list[tuple[int, int, int]] = []
        self._numbers, self._flags = list(numbers) or [0], flags

    def sync_file_range(self, _fd: int, start: int, length: int, flags: int) -> int:
        self.told.append((start, length, flags))
        if self._flags not in {None, flags}:
            return 0
        number = self._numbers.pop(0) if len(self._numbers) > 1 else self._numbers[0]
        ctypes.set_errno(number)
        return -1 if number else 0

    def syscall(self, *_: object) -> int:
        return -1

    def mmap(self, *_: object) -> int | None:
        return ctypes.c_void_p(-1).value


def test_a_new_file_is_written_back_behind_the_stream_two_windows_at_most(
    monkeypatch: pytest.MonkeyPatch, fd: int
) -> None:
    calls = Calls()
    monkeypatch.setattr(pagecalls, "_libc", lambda: calls)
    with PageCache(keeps=True).writing(fd, 0, 3 * WINDOW, is_new=True) as passage:
        passage.passed(WINDOW - 1)
        assert calls.told == []
        passage.passed(WINDOW)
        assert calls.told == [(0, WINDOW, 2)]
        passage.passed(2 * WINDOW)
        assert calls.told[1:] == [(WINDOW, WINDOW, 2), (0, WINDOW, 7)]
        passage.passed(3 * WINDOW)
        assert calls.told[3:] == [
            (2 * WINDOW, WINDOW, 2),
            (WINDOW, WINDOW, 7),
            (2 * WINDOW, WINDOW, 7),
        ]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_could_not_be_stored_is_never_kept_from_fsync(
    monkeypatch: pytest.MonkeyPatch, fd: int, number: int
) -> None:
    monkeypatch.setattr(pagecalls, "_libc", lambda: Calls(number))
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what counts
        write(fd)
    assert caught.value.errno == number


#: With what a device's driver, or a server of files, may say that it has not stored what it got.
UNSTORED = (errno.EIO, errno.ENOMEM, errno.ENODEV, errno.EACCES)


@pytest.mark.parametrize("number", UNSTORED)
@pytest.mark.parametrize("fields", [{}, {"format": "raw"}], ids=["file", "raw"])
def test_whatever_a_wait_says_fails_the_write_for_fsync_would_not_say_it_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: dict[str, str], number: int
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    image = FILE.parse({"file": str(path), **fields})
    assert isinstance(image, FileImage)
    backend = (RawFiles if fields else ImageFiles)(MIB).open(image, Intent.REPLACE)
    monkeypatch.setattr(pagecalls, "_libc", lambda: Calls(number, flags=WAITS))

    with closing(backend), pytest.raises(FileAccessError):
        list(backend.replace(SIZE, Ones()))


@pytest.mark.parametrize("flags", [BEGINS, WAITS])
def test_a_call_that_is_interrupted_is_made_again(
    monkeypatch: pytest.MonkeyPatch, fd: int, flags: int
) -> None:
    calls = Calls(errno.EINTR, errno.EINTR, 0, flags=flags)
    monkeypatch.setattr(pagecalls, "_libc", lambda: calls)
    write(fd)
    assert calls.told.count((0, WINDOW, flags)) == 3


def test_nobody_waits_for_what_could_not_be_begun(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    calls = Calls(errno.ENOMEM, 0, flags=BEGINS)
    monkeypatch.setattr(pagecalls, "_libc", lambda: calls)
    write(fd)
    assert (0, WINDOW, WAITS) not in calls.told
    assert (WINDOW, WINDOW, WAITS) in calls.told


@pytest.mark.parametrize("name", ["fstat", "posix_fadvise"])
@pytest.mark.parametrize("move", [read, write])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_advice_that_fails_fails_no_stream(
    monkeypatch: pytest.MonkeyPatch, fd: int, move: Callable[..., None], name: str, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    touch(fd, SOMEBODYS)  # so that the kernel is asked for each page
    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        move(fd)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
@pytest.mark.parametrize("move", [read, write])
def test_calls_that_the_host_lacks_or_forbids_are_done_without(
    monkeypatch: pytest.MonkeyPatch, fd: int, move: Callable[..., None], number: int
) -> None:
    monkeypatch.setattr(pagecalls, "_libc", lambda: Calls(number))

    move(fd)


@needs_cache
@pytest.mark.parametrize("fields", [{}, {"format": "raw"}], ids=["file", "raw"])
@pytest.mark.parametrize("keeps", [False, True])
def test_images_are_read_and_written_in_this_way(
    tmp_path: Path, fields: dict[str, str], *, keeps: bool
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"")
    os.truncate(path, SIZE)
    image = FILE.parse({"file": str(path), **fields})
    assert isinstance(image, FileImage)
    files = (RawFiles if fields else ImageFiles)(MIB, pages=PageCache(keeps=keeps))

    def left() -> int:
        with path.open("r+b") as file:
            return len(cached(file.fileno()))

    backend = files.open(image, Intent.REPLACE)
    assert list(backend.replace(SIZE, Ones()))[-1] == SIZE
    backend.close()
    assert left() == keeps * (SIZE // PAGE + 1)

    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    backend = files.open(image, Intent.READ)
    for piece in backend.read(0, SIZE):
        if piece[-1:] == b"\2":
            backend.close()  # before the last piece is sent, as sessions do
    backend.close()
    assert left() == keeps * (SIZE // PAGE + 1)


class Ones:
    """A body of ones, the last byte a two."""

    left = SIZE

    def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        count = min(len(buffer), self.left)
        buffer[:count] = b"\1" * count
        self.left -= count
        if count and not self.left:
            buffer[count - 1] = 2
        return count

    def verify(self, written: int = 0) -> None: ...
