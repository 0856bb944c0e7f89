# SPDX-License-Identifier: Apache-2.0
"""Image files: read as they are, replaced as a whole, synced on flush.

A replacement is written to a nameless file in the target's own directory, synced, given a
name and renamed over the target:

    O_TMPFILE --write--> fsync --linkat--> .imageserver-XXXX.part --rename--> image --fsync--> dir

so readers and disk see the old image or the new one, and whoever dies on the way leaves
nothing behind (but for the moment between linkat and rename; the next replacement in that
directory sweeps such a file, which is told from a live one by its lock). Where the file
system has no O_TMPFILE, the file has its name from the beginning.

Block devices cannot be replaced and are written in place.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Generator, Iterator
from typing import Self

from imageserver.errors import BadRequest, FileAccessError, NoSpace, ShortBody
from imageserver.extents import Extent
from imageserver.ports import ImageInfo, Intent, Source
from imageserver.transfers import FileImage

_PREFIX = ".imageserver-"
_SUFFIX = ".part"
#: Holes are looked for in steps of this size, the default cluster of qcow2 and the usual
#: extent granularity; a step that is all zeros is skipped, not written.
_HOLE = 64 * 1024
_ZEROS = bytes(_HOLE)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}


class ImageFiles:
    """Opens image files; one for all requests."""

    def __init__(self, chunk_size: int, roots: tuple[str, ...] = ()) -> None:
        self._chunk_size = chunk_size
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def open(self, image: FileImage, intent: Intent) -> "ImageFile":
        """Open a regular file or block device.

        Raises:
            FileAccessError: it cannot be opened or sized, is something else, or lies
                outside the configured roots.
        """
        path = os.path.realpath(image.path)
        if self._roots and not any(_lies_in(path, root) for root in self._roots):
            raise FileAccessError(f"{path} lies outside IMAGESERVER_FILE_ROOTS")
        try:
            return ImageFile(path, intent, self._chunk_size)
        except OSError as exc:
            raise FileAccessError(str(exc)) from exc


def _lies_in(path: str, root: str) -> bool:
    return os.path.commonpath((path, root)) == root


class ImageFile:
    """One open image file: a ``ports.Backend`` that cannot write ranges."""

    settled = True

    def __init__(self, path: str, intent: Intent, chunk_size: int) -> None:
        """Open ``path``, which must be resolved.

        Raises:
            OSError: open(2), fstat(2) or lseek(2) failed.
            FileAccessError: neither regular file nor block device.
        """
        self._path = path
        self._chunk = chunk_size
        self._fd = -1
        self._mode = stat.S_IFREG
        size = 0
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        try:
            found = os.stat(path)
        except FileNotFoundError:
            if intent is not Intent.REPLACE:
                raise
        else:
            self._mode = found.st_mode
            if not (stat.S_ISREG(self._mode) or stat.S_ISBLK(self._mode)):
                raise FileAccessError(f"{path} is neither a regular file nor a block device")
            in_place = intent is Intent.REPLACE and stat.S_ISBLK(self._mode)
            self._fd = os.open(path, flags | (os.O_RDWR if in_place else os.O_RDONLY))
            # lseek, for st_size of a block device is 0.
            size = os.lseek(self._fd, 0, os.SEEK_END)
        self.size = size
        self.info = ImageInfo(size, read_only=False, can_zero=False, can_flush=True)

    def read(self, start: int, length: int) -> Generator[memoryview]:
        """Yield ``length`` bytes from ``start``: see ``ports.Backend``."""
        buffer = memoryview(bytearray(min(self._chunk, length)))
        at, stop = start, start + length
        while at < stop:
            try:
                count = os.preadv(self._fd, [buffer[: stop - at]], at)
            except OSError as exc:
                raise FileAccessError(str(exc)) from exc
            if count == 0:
                raise FileAccessError(f"{self._path} has become shorter than {stop} bytes")
            at += count
            yield buffer[:count]

    def replace(self, length: int, source: Source) -> Iterator[int]:
        """Make the body the whole image: see ``ports.Backend``."""
        try:
            if stat.S_ISBLK(self._mode):
                yield from self._overwrite(length, source)
            else:
                yield from self._replace(length, source)
        except OSError as exc:
            if exc.errno in _NO_SPACE:
                raise NoSpace(str(exc)) from exc
            raise FileAccessError(str(exc)) from exc

    def _overwrite(self, length: int, source: Source) -> Iterator[int]:
        if length > self.info.size:
            raise BadRequest(
                f"Content-Length ({length}) must not exceed device size ({self.info.size})"
            )
        for offset, data in self._pieces(length, source):
            _write_all(self._fd, data, offset)
            yield offset + len(data)

    def _replace(self, length: int, source: Source) -> Iterator[int]:
        sweep(os.path.dirname(self._path))
        with _NewFile(os.path.dirname(self._path)) as new:
            for offset, data in self._pieces(length, source):
                _write_sparsely(new.fd, data, offset)
                yield offset + len(data)
            os.ftruncate(new.fd, length)
            if self._fd >= 0:
                _copy_attributes(self._fd, new.fd)
            os.fsync(new.fd)
            new.rename(self._path)
        yield length

    def _pieces(self, length: int, source: Source) -> Iterator[tuple[int, memoryview]]:
        """Yield (offset, bytes) until the body is complete."""
        buffer = memoryview(bytearray(min(self._chunk, length)))
        at = 0
        while at < length:
            wanted = buffer[: length - at]
            filled = 0
            while filled < len(wanted):
                count = source.readinto(wanted[filled:])
                if count == 0:
                    raise ShortBody(at + filled)
                filled += count
            yield at, wanted
            at += filled

    def write(self, start: int, length: int, source: Source) -> Iterator[int]:
        """Range writes are not offered for files; the web layer refuses them first."""
        raise FileAccessError("range writes are not supported for files")

    def zero(self, start: int, length: int) -> Iterator[int]:
        """Zeroing is not offered for files; the web layer refuses it first."""
        raise FileAccessError("zeroing is not supported for files")

    def flush(self) -> None:
        """Sync the data, then the directory that names it (fsync(2))."""
        try:
            os.fsync(self._fd)
            if stat.S_ISREG(self._mode):
                _sync_directory(os.path.dirname(self._path))
        except OSError as exc:
            raise FileAccessError(str(exc)) from exc

    def extents(self, *, dirty: bool) -> Generator[list[Extent]]:
        """Extents are not offered for files; the web layer refuses them first."""
        raise FileAccessError("extents are not supported for files")

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)


class _NewFile:
    """A file that gets its name when it is complete; gone otherwise."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._name: str | None = None
        try:
            self.fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            if exc.errno not in _NO_TMPFILE:
                raise
            self._name = self._new_name()
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(self._name, flags, 0o600)
        # Tells this file from one whose writer died: see sweep.
        fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _new_name(self) -> str:
        return os.path.join(self._directory, f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}")

    def rename(self, target: str) -> None:
        """Put the file in the target's place, and that on disk."""
        if self._name is None:
            name = self._new_name()
            # open(2), O_TMPFILE: how a nameless file gets one without CAP_DAC_READ_SEARCH. With a
            # directory descriptor, for without one Python calls link(2), which follows nothing.
            proc = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.link(str(self.fd), name, src_dir_fd=proc, follow_symlinks=True)
            finally:
                os.close(proc)
            self._name = name
        os.rename(self._name, target)
        self._name = None
        _sync_directory(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._name is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._name)
        os.close(self.fd)


def sweep(directory: str) -> None:
    """Remove what writers that died have left in ``directory``."""
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                _remove_if_abandoned(entry.path)


def _remove_if_abandoned(path: str) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                os.unlink(path)
        finally:
            os.close(fd)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _write_sparsely(fd: int, data: memoryview, offset: int) -> None:
    """Write ``data`` into a new file, leaving holes where it is zero."""
    raw = data.obj
    assert isinstance(raw, bytearray)  # noqa: S101 - whose startswith compares in place
    run = at = 0
    while at < len(data):
        step = min(_HOLE, len(data) - at)
        if raw.startswith(_ZEROS[:step], at):
            if run < at:
                _write_all(fd, data[run:at], offset + run)
            run = at + step
        at += step
    if run < len(data):
        _write_all(fd, data[run:], offset + run)


def _copy_attributes(old: int, new: int) -> None:
    """Carry owner, mode and extended attributes (ACLs and labels among them) over."""
    found = os.fstat(old)
    mine = os.fstat(new)
    if (found.st_uid, found.st_gid) != (mine.st_uid, mine.st_gid):
        os.fchown(new, found.st_uid, found.st_gid)
    for name in _attributes(old):
        os.setxattr(new, name, os.getxattr(old, name))
    os.fchmod(new, stat.S_IMODE(found.st_mode))  # last: fchown clears set-id bits


def _attributes(fd: int) -> list[str]:
    try:
        return os.listxattr(fd)
    except OSError as exc:
        if exc.errno == errno.EOPNOTSUPP:
            return []
        raise


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
