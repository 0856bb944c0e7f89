# SPDX-License-Identifier: Apache-2.0
"""Files moved past the host's page cache, each part of which is known to it or not.

What asks about the page cache, or gives parts of it back, is advice: that it fails must not be seen
in an answer. But what could not be written back is told once, by sync_file_range(2) or fsync(2)
(errseq in Linux's Documentation/core-api/errseq.rst): then the answer is no 200.
"""

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from imageserver.backends.file import pagecache
from proving.operations import mixes, reads
from proving.qcow2_streams import Qcow2Streams
from proving.sweep import Operation
from proving.world import Answer, World

_PAGE = os.sysconf("SC_PAGE_SIZE")
#: So that small files have many windows, and end in the middle of one.
_WINDOW, _LEAST = 64 << 10, 32 << 10
_SIZE = 6 * _WINDOW + 3 * _PAGE + 512
_HOLE = slice(2 * _WINDOW, 3 * _WINDOW)
_SPAN = slice(_WINDOW // 2, 5 * _WINDOW - 99)
_OK = 200
_DONE = {_OK, 206}
_ADVICE = {"cachestat", "mincore", "madvise", "mmap", "munmap", "access", "posix_fadvise"}
_SYNC = {"sync_file_range_wait", "fsync", "fdatasync"}
#: What sync_file_range says of a call that is not there, or of memory: the data stay dirty.
_HARMLESS = {errno.ENOSYS, errno.ENOMEM, errno.EINTR}


def _filled(word: bytes) -> bytes:
    content = bytearray((word * (_SIZE // len(word) + 1))[:_SIZE])
    content[_HOLE] = bytes(_HOLE.stop - _HOLE.start)
    return bytes(content)


_OLD, _NEW = _filled(b"old!"), _filled(b"new?")
_PATCHED = _OLD[: _SPAN.start] + _NEW[_SPAN] + _OLD[_SPAN.stop :]
_RANGE = {"Range": f"bytes={_SPAN.start}-{_SPAN.stop - 1}"}


@contextmanager
def with_windows() -> Iterator[World]:
    """Yield a world whose windows are small, with a plain file and a raw one."""
    before = pagecache.WINDOW, pagecache.LEAST
    pagecache.WINDOW, pagecache.LEAST = _WINDOW, _LEAST
    try:
        with World() as world:
            world.add("image", backend="file", file=str(world.images / "image"))
            world.add("raw", backend="file", file=str(world.images / "raw"), format="raw")
            yield world
    finally:
        pagecache.WINDOW, pagecache.LEAST = before


def _prepared(name: str) -> Callable[[World], None]:
    """Let one page of each second window be in the cache, and none of the others."""

    def prepare(world: World) -> None:
        path = world.images / name
        if not path.exists() or path.read_bytes() != _OLD:
            _write(path)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for at in range(_PAGE, _SIZE, 2 * _WINDOW):
                os.pread(file.fileno(), 1, at)

    return prepare


def _write(path: Path) -> None:
    with path.open("wb") as file:
        file.write(_OLD[: _HOLE.start])
        file.seek(_HOLE.stop)
        file.write(_OLD[_HOLE.stop :])
        file.flush()
        os.fsync(file.fileno())  # what is dirty is not dropped


def _owes(world: World, answer: Answer, call: str, error: int) -> Iterator[str]:
    is_done = answer.status in _DONE and not answer.cut
    if call in _ADVICE and not is_done:
        yield f"{answer.status} {answer.body[:99]!r}, because of advice"
    if call == "sync_file_range" and error in _HARMLESS and not is_done:
        yield f"{answer.status} {answer.body[:99]!r}, and nothing was lost"
    if call in _SYNC and is_done is not (error == errno.EINTR):
        yield f"{answer.status}, and what was written was {'' if is_done else 'not '}lost"
    for start, stop, path in _mapped(world):
        if call == "munmap":  # there is nothing else to be done about that
            ctypes.CDLL(None).munmap(ctypes.c_void_p(start), ctypes.c_size_t(stop - start))
        else:
            yield f"a mapping: {path}"


def _mapped(world: World) -> Iterator[tuple[int, int, str]]:
    """Yield the addresses at which images are mapped (proc_pid_maps(5))."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{world.images}/" in line:
            span, *_, path = line.split()
            start, stop = (int(number, 16) for number in span.split("-"))
            yield start, stop, path


def _writes(name: str, wanted: bytes) -> Callable[[World, Answer], Iterator[str]]:
    """A plain file is the old or the new one, and each byte of a raw one is."""

    def check(world: World, answer: Answer) -> Iterator[str]:
        now = (world.images / name).read_bytes()
        if answer.status == _OK and now != wanted:
            yield "200, and not all of it was written"
        if not (mixes(now, _OLD, wanted) if name == "raw" else now in {_OLD, wanted}):
            yield f"{answer.status}, and there is what nobody has written"

    return check


OPERATIONS = tuple(
    replace(operation, owes=_owes)
    for operation in (
        Operation(
            "cached GET",
            lambda w: w.ask("GET", "/images/image"),
            reads(_OLD),
            _prepared("image"),
        ),
        Operation(
            "cached raw GET",
            lambda w: w.ask("GET", "/images/raw"),
            reads(_OLD),
            _prepared("raw"),
        ),
        Operation(
            "cached raw range",
            lambda w: w.ask("GET", "/images/raw", headers=_RANGE),
            reads(_OLD[_SPAN]),
            _prepared("raw"),
        ),
        Operation(
            "cached PUT",
            lambda w: w.ask("PUT", "/images/image?flush=y", _NEW),
            _writes("image", _NEW),
            _prepared("image"),
        ),
        Operation(
            "cached raw PUT",
            lambda w: w.ask("PUT", "/images/raw?flush=y", _NEW),
            _writes("raw", _NEW),
            _prepared("raw"),
        ),
        Operation(
            "cached raw PATCH",
            lambda w: w.ask("PATCH", "/images/raw", _NEW[_SPAN], _RANGE),
            _writes("raw", _PATCHED),
            _prepared("raw"),
        ),
        Qcow2Streams("/images/raw", _OLD, prepare=_prepared("raw")).whole("cached raw "),
    )
)
