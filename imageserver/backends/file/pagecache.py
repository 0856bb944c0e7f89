# SPDX-License-Identifier: Apache-2.0
"""The host's page cache: what a long transfer brings into it leaves it again, behind the transfer.

On a hypervisor the page cache is the guests'. A stream of a file would fill it with bytes that
nobody reads again, and a long fsync would follow an upload. So both go in windows:

              dropped | moved now | asked about | not looked at
    read   -----------|-----------|-------------|------------>
              dropped | written back | written now
    write  -----------|--------------|----------------------->

- Before a stream reaches a window, mincore(2) says which of its pages are in the cache already.
  Those are somebody else's: they stay. Some windows ahead, since the kernel reads ahead.
- Behind a read, posix_fadvise(2) DONTNEED drops the others. It drops no page that is dirty or
  mapped.
- Behind a write, sync_file_range(2) starts to write a window back when it is full, and waits for
  the one before that, which then can be dropped. So no more than three windows are ever dirty, the
  client sends no faster than the disk writes, and little is left for fsync(2).

Where the kernel, the file system or a seccomp filter lacks a call, or the kernel does not tell this
user what is cached (``find_cached``), that part is left out: the cache then keeps more. tmpfs has
no cache to leave.

What the kernel is asked for all that, and which of its errors may be ignored: ``pagecalls``.
"""

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Self

from imageserver.backends.file.pagecalls import PAGE, drop, find_cached, pages, write_back

MIB = 1 << 20
#: What is asked about, written back and dropped at once.
WINDOW = 8 * MIB
#: Windows that are asked about before a read reaches them: more than the kernel reads ahead, which
#: is 128 KiB, or what ``read_ahead_kb`` of the device says, and twice that at times: 8 MiB on some
#: virtual disks. Were it more, all would look cached. What it reads beyond the end of a range stays
#: for the next range, whose stream may be reading there already, and drops it if it comes through
#: the same process. (Reading ahead here, with POSIX_FADV_WILLNEED, was three times slower.)
_LEAD = 3
_READ_AHEAD = 16 * MIB
#: ... and is remembered for so long, of so many streams.
_SECONDS, _REMEMBERED = 30.0, 64
#: Shorter streams leave the cache as the kernel has it. Asking and dropping takes 0.1 ms a stream.
LEAST = 4 * MIB
#: The most that the kernel keeps, and drops, as one (a huge page).
_FOLIO = 2 * MIB
_ABSENT = re.compile(rb"\0+")

#: Writes all of a piece at an offset of the file.
Write = Callable[[memoryview, int], None]


class PageCache:
    """What is done about the host's page cache, for all files."""

    def __init__(self, *, keeps: bool = False) -> None:
        """``keeps``: nothing is dropped; uploads are written back as they come all the same."""
        self._keeps = keeps
        self._ahead: deque[_ReadAhead] = deque(maxlen=_REMEMBERED)

    def reading(self, fd: int, start: int, stop: int) -> "Passage":
        """Return the passage of a read of [start, stop)."""
        if self._keeps or stop - start < LEAST:
            return _UNNOTICED
        with contextlib.suppress(OSError):
            return _ReadingPassage(fd, start, stop, self._ahead)
        return _UNNOTICED

    def writing(self, fd: int, start: int, stop: int, *, is_new: bool = False) -> "Passage":
        """Return the passage of a write; ``is_new``: of a new file, of which nothing is cached."""
        if stop - start < LEAST:
            return _UNNOTICED
        return _WritingPassage(fd, start, stop, keeps=self._keeps, is_new=is_new)


class Passage:
    """A stream's way through the page cache. One thread uses it; the file is open meanwhile."""

    def passed(self, at: int) -> None:
        """Say that everything before ``at`` has been moved.

        With the end of the stream everything is given back: the file may then be closed.

        Raises:
            OSError: what was written cannot be stored.
        """

    def after(self, write: Write) -> Write:
        """Return a ``write`` that says here what it has written."""
        return write

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Give back what a stream has brought that has not come to its end."""


_UNNOTICED = Passage()


class _Window(NamedTuple):
    start: int
    stop: int
    cached: bytes | None
    """For each page, 1 where it was in the cache before; None: it is not known."""


class _ReadAhead(NamedTuple):
    """What the kernel may have read of a file beyond the end of a stream of ours."""

    seconds: float  # when it was asked about (monotonic clock)
    device: int
    inode: int
    window: _Window


class _Passage(Passage):
    """Of a stream whose pages can be dropped when they have been moved."""

    def __init__(
        self, fd: int, start: int, stop: int, *, keeps: bool, is_new: bool = False
    ) -> None:
        self._fd = fd
        self._next, self._stop = start // PAGE * PAGE, stop
        self._keeps, self._is_new = keeps, is_new
        self._dropped: tuple[int, int] = (0, 0)
        self._windows: deque[_Window] = deque()
        for _ in range(1 + _LEAD):
            self._ask()

    def passed(self, at: int) -> None:
        while self._windows and self._windows[0].stop <= at:
            self._leave(self._windows.popleft())
            self._ask()
        if at >= self._stop:
            self._finish()

    def after(self, write: Write) -> Write:
        def written(data: memoryview, at: int) -> None:
            write(data, at)
            self.passed(at + len(data))

        return written

    def __exit__(self, *_exc: object) -> None:
        while self._windows and not self._is_new:  # a new file that is given up is removed
            self._drop(self._windows.popleft())

    def _ask(self) -> None:
        start, stop = self._next, min(self._next + WINDOW, self._stop)
        if start >= stop:
            return
        self._next = stop
        cached: bytes | None = None
        if not self._keeps:
            cached = bytes(pages(stop - start)) if self._is_new else self._find(start, stop - start)
        self._windows.append(_Window(start, stop, cached))

    def _find(self, start: int, length: int) -> bytes | None:
        return find_cached(self._fd, start, length)

    def _leave(self, window: _Window) -> None:
        self._drop(window)

    def _finish(self) -> None:
        while self._windows:
            self._leave(self._windows.popleft())

    def _drop(self, window: _Window) -> None:
        if window.cached is None:
            return
        for run in _ABSENT.finditer(window.cached):
            start, stop = window.start + run.start() * PAGE, window.start + run.end() * PAGE
            before, self._dropped = self._dropped, (start, stop)
            if start == before[1]:  # no folio is dropped in halves
                start = max(before[0], start - _FOLIO)
            drop(self._fd, start, stop)


class _ReadingPassage(_Passage):
    """Of a read."""

    def __init__(self, fd: int, start: int, stop: int, ahead: "deque[_ReadAhead]") -> None:
        found = os.fstat(fd)
        self._file = found.st_dev, found.st_ino
        self._ahead = ahead
        self._has_looked_beyond = False
        super().__init__(fd, start, stop, keeps=False)

    def _ask(self) -> None:
        super()._ask()
        if self._next >= self._stop and not self._has_looked_beyond:
            self._has_looked_beyond = True
            start = pages(self._stop) * PAGE
            beyond = _Window(start, start + _READ_AHEAD, self._find(start, _READ_AHEAD))
            self._ahead.append(_ReadAhead(time.monotonic(), *self._file, beyond))

    def _find(self, start: int, length: int) -> bytes | None:
        cached = super()._find(start, length)
        since = time.monotonic() - _SECONDS
        for seconds, *file, window in tuple(self._ahead):
            if cached and window.cached and seconds > since and (*file,) == self._file:
                cached = _without(cached, start, window.cached, window.start)
        return cached


class _WritingPassage(_Passage):
    """Of a write, whose pages must be on the disk before they can be dropped."""

    def __init__(self, *args: int, keeps: bool, is_new: bool) -> None:
        self._under_way: tuple[_Window, bool] | None = None
        super().__init__(*args, keeps=keeps, is_new=is_new)

    def _leave(self, window: _Window) -> None:
        has_begun = write_back(self._fd, window.start, window.stop)
        self._settle()
        self._under_way = window, has_begun

    def _settle(self) -> None:
        if under_way := self._under_way:
            self._under_way = None
            window, has_begun = under_way
            if has_begun:
                write_back(self._fd, window.start, window.stop, waits=True)
            self._drop(window)

    def _finish(self) -> None:
        super()._finish()
        self._settle()


def _without(cached: bytes, start: int, before: bytes, first: int) -> bytes:
    """Return what of ``cached`` was there ``before``; these begin at ``start`` and at ``first``."""
    at = (first - start) // PAGE
    low, high = max(at, 0), min(at + len(before), len(cached))
    if low >= high:
        return cached
    both = int.from_bytes(cached[low:high]) & int.from_bytes(before[low - at : high - at])
    return cached[:low] + both.to_bytes(high - low) + cached[high:]


def neighbours(spans: Iterable[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Put spans, in their order, into lists that are streams: what is far ahead begins another."""
    near: list[tuple[int, int]] = []
    for span in spans:
        if near and not 0 <= span[0] - near[-1][1] <= WINDOW:
            yield near
            near = []
        near.append(span)
    if near:
        yield near
