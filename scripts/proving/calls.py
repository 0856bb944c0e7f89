# SPDX-License-Identifier: Apache-2.0
"""The Nth call fails: for N = 1, 2, 3 ... until an operation passes without reaching it.

After each: the answer is an error or the right one, an image is the old one or the new one, no
descriptor and no file is left behind, no lock and no slot is held, and the next request succeeds.
"""

import errno
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.faults import Faults

from proving import cached_files, operations
from proving.qcow2_streams import Qcow2Streams
from proving.sweep import Fault, Operation, Worlds, sweep
from proving.world import Answer, World

ERRORS = (errno.EIO, errno.ENOSPC, errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.ENOSYS)
#: A disk of data, a hole, and data so far away that it is looked for, and read, by itself.
_FAR = 66 << 20
_DISK = (b"disk" * 17_000).ljust(_FAR, b"\0") + b"end." * 17_000
_SMALL_CLUSTERS = "&cluster_size=4096"
_OK, _PARTIAL = 200, 206
#: A part of it that is read in three pieces.
_PART = slice(10_000, 600_000)


@contextmanager
def _with_image() -> Iterator[World]:
    with World() as world:
        world.add("image", backend="file", file=str(world.images / "image"))
        world.add("raw", backend="file", file=str(world.images / "raw"), format="raw")
        yield world


@contextmanager
def _with_disk(path: Path) -> Iterator[World]:
    """Yield a world with a file that has been there before it, and stays, in two ways."""
    with World() as world:
        world.add("plain", backend="file", file=str(path))
        world.add("disk", backend="file", file=str(path), format="raw")
        yield world


def _write_sparsely(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.truncate(len(content))
        for at in range(0, len(content), 4096):
            if any(content[at : at + 4096]):
                file.seek(at)
                file.write(content[at : at + 4096])


def _one_state(name: str, path: str) -> Operation:
    """Read a part of a file that has an ETag: all bytes must be of the state that has it."""
    etag = ""

    def prepare(world: World) -> None:
        nonlocal etag
        etag = etag or world.etag(path)

    def read(world: World) -> Answer:
        part = f"bytes={_PART.start}-{_PART.stop - 1}"
        return world.ask("GET", path, headers={"Range": part, "If-Range": etag})

    def check(_world: World, answer: Answer) -> Iterator[str]:
        if answer.status in {_OK, _PARTIAL}:
            expected = _DISK if answer.status == _OK else _DISK[_PART]
            if not (expected.startswith(answer.body) if answer.cut else answer.body == expected):
                yield f"{answer.status} with {len(answer.body)} wrong bytes"

    return Operation(name, read, check, prepare)


def run(errors: Iterable[int] = ERRORS, names: Iterable[str] = ()) -> Iterator[Fault]:
    """Sweep all operations, or those of these names."""
    faults, errors = Faults(), tuple(errors)

    def swept(done: Iterable[Operation], worlds: Worlds) -> Iterator[Fault]:
        for operation in done:
            if not names or operation.name in names:
                for error in errors:
                    yield from sweep(operation, error, faults, worlds)

    yield from swept(operations.OPERATIONS, _with_image)
    yield from swept(cached_files.OPERATIONS, cached_files.with_windows)
    with tempfile.TemporaryDirectory(prefix="is-proof-") as place:
        disk = Path(place, "disk")
        _write_sparsely(disk, _DISK)
        streams = Qcow2Streams("/images/disk", _DISK, _SMALL_CLUSTERS)
        parts = (_one_state("part", "/images/plain"), _one_state("raw part", "/images/disk"))
        yield from swept((*parts, *streams.operations("raw ")), lambda: _with_disk(disk))
