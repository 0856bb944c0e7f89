# SPDX-License-Identifier: Apache-2.0
"""Image files: read as they are, replaced as a whole, synced on flush.

A file is found once, as a name in an open directory (``places``). A replacement is written
beside its target and renamed over it (``replacement``); receiving it and writing it overlap
(``copying``).

Block devices cannot be replaced and are written in place.
"""

import os
import stat
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack

from imageserver.backends.descriptors import close_fd
from imageserver.backends.file.copying import Write, copy
from imageserver.backends.file.failures import failure
from imageserver.backends.file.kind import FileImage
from imageserver.backends.file.pagecache import PageCache
from imageserver.backends.file.places import Place, locate
from imageserver.backends.file.replacement import (
    NewFile,
    check_target,
    copy_attributes,
    old_kept,
    sweep,
)
from imageserver.backends.file.state import is_unchanged, size_and_validators
from imageserver.core.errors import BadRequest, FileAccessError
from imageserver.core.extents import Extent
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Check, Intent, no_client
from imageserver.core.sources import Body, Source
from imageserver.core.transfer import Transfer, path_text

#: Holes are looked for in steps of this size, the default cluster of qcow2 and the usual
#: extent granularity; a step that is all zeros is skipped, not written.
_HOLE = 64 * 1024
_ZEROS = bytes(_HOLE)
#: What needs the image's directory, too.
_CHANGING = {Intent.REPLACE, Intent.FLUSH}
#: Bytes per read: what is read stays in a core's second-level cache until it has been sent.
#: Measured on loopback: 256 KiB moves 3000 to 4200 MiB/s, 1 MiB 2900 to 3300.
_READ_SIZE = 256 * 1024


class ImageFiles:
    """Opens image files; one for all requests."""

    def __init__(
        self, chunk_size: int, roots: tuple[str, ...] = (), pages: PageCache | None = None
    ) -> None:
        self._chunk_size = chunk_size
        self._pages = pages or PageCache()
        self._roots = tuple(os.path.realpath(os.fsencode(root)) for root in roots)

    def open(
        self,
        image: FileImage,
        intent: Intent,
        _check: Check = no_client,
        _transfer: Transfer | None = None,
    ) -> "ImageFile":
        """Open a regular file or block device.

        Raises:
            FileAccessError: it cannot be opened or sized, is something else, or lies
                outside the configured roots, or in /proc or /sys.
        """
        place = locate(image, self._roots)
        try:
            return ImageFile(place, intent, self._chunk_size, self._pages)
        except OSError as exc:
            raise failure(place.path, exc) from exc

    def settle(self, image: FileImage, check: Check = no_client) -> None:
        """Return at once: the writes of a dead process end with it."""

    def drain(self) -> None:
        """Return at once: nothing is kept open."""


class ImageFile:
    """One open image file: a ``ports.Backend`` that cannot write ranges."""

    settled = True

    def __init__(self, place: Place, intent: Intent, chunk_size: int, pages: PageCache) -> None:
        """Open what lies at ``place``, which is closed with this.

        Raises:
            OSError: open(2), fstat(2) or lseek(2) failed.
            FileAccessError: neither regular file nor block device.
        """
        self._place = place
        self._chunk = chunk_size
        self._pages = pages
        self._fd = -1
        self._is_replaced = False
        self._mode = stat.S_IFREG
        self._found = None
        try:
            self._found = self._find(intent)
            size, state = size_and_validators(self._fd, self._found)
        except BaseException:
            self.close()
            raise
        if intent not in _CHANGING:
            place.close()  # descriptors are few
        self.size = size
        self.align = 1
        self.info = ImageInfo(
            *(size, False, False, True),  # not read-only, nor zeroed; it can be flushed
            flushes_image=True,
            state=state,
        )

    def _find(self, intent: Intent) -> os.stat_result | None:
        """Open the file; return its attributes, None where there is none."""
        try:
            # Before it is opened, which is an event for some devices.
            self._check(self._place.stat())
        except FileNotFoundError:
            if intent is not Intent.REPLACE:
                raise
            return None
        in_place = intent is Intent.REPLACE and stat.S_ISBLK(self._mode)
        self._fd = self._place.open(os.O_RDWR if in_place else os.O_RDONLY)
        found = os.fstat(self._fd)
        self._check(found)  # it may be another one by now
        if in_place is not (intent is Intent.REPLACE and stat.S_ISBLK(self._mode)):
            raise FileAccessError(f"{path_text(self._place.path)} has become something else")
        return found

    def _check(self, found: os.stat_result) -> None:
        self._mode = found.st_mode
        if not (stat.S_ISREG(self._mode) or stat.S_ISBLK(self._mode)):
            path = path_text(self._place.path)
            raise FileAccessError(f"{path} is neither a regular file nor a block device")

    def is_unchanged(self) -> bool:
        """Tell whether the file has not been written to since it was opened."""
        if self._found is None:
            return False
        return is_unchanged(self._place.path, self._fd, self._found)

    def read(self, start: int, length: int) -> Generator[memoryview]:
        """Yield ``length`` bytes from ``start``: see ``ports.Backend``."""
        buffer = memoryview(bytearray(min(self._chunk, _READ_SIZE, length)))
        at, stop = start, start + length
        with self._pages.reading(self._fd, start, stop) as passage:
            while at < stop:
                try:
                    count = os.preadv(self._fd, [buffer[: stop - at]], at)
                    passage.passed(at + count)
                except OSError as exc:
                    raise failure(self._place.path, exc) from exc
                if count == 0:
                    path = path_text(self._place.path)
                    raise FileAccessError(f"{path} has become shorter than {stop} bytes")
                at += count
                yield buffer[:count]

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Generator[memoryview]:
        """Yield the bytes of spans, one after the other."""
        for start, stop in spans:
            yield from self.read(start, stop - start)

    def replace(self, length: int, source: Body) -> Iterator[int]:
        """Make the body the whole image: see ``ports.Backend``."""
        try:
            if stat.S_ISBLK(self._mode):
                yield from self._overwrite(length, source)
            else:
                yield from self._replace(length, source)
        except OSError as exc:
            raise failure(self._place.path, exc) from exc

    def _overwrite(self, length: int, source: Source) -> Iterator[int]:
        if length > self.size:
            raise BadRequest(f"Content-Length ({length}) must not exceed device size ({self.size})")
        with self._pages.writing(self._fd, 0, length) as passage:
            write = passage.after(lambda data, at: _write_all(self._fd, data, at))
            yield from self._copy(length, source, write)

    def _copy(self, length: int, source: Source, write: Write) -> Iterator[int]:
        return copy(length, source, write, chunk=self._chunk, owner=self._place.path)

    def _replace(self, length: int, source: Body) -> Iterator[int]:
        with ExitStack() as held:
            directory = self._place.open_directory()
            held.callback(close_fd, directory)
            sweep(directory)
            new = held.enter_context(self._prepare(directory, length))
            passage = held.enter_context(self._pages.writing(new.fd, 0, length, is_new=True))
            write = passage.after(lambda data, at: _write_sparsely(new.fd, data, at))
            yield from self._copy(length, source, write)
            source.verify()
            os.ftruncate(new.fd, length)
            if self._fd >= 0:
                copy_attributes(self._fd, new.fd)  # again, for writing clears set-id bits
            os.fsync(new.fd)
            with old_kept(directory, self._place.name, self._fd, new.fd):
                new.rename(self._place.name)
                os.fsync(directory)
        self._is_replaced = True
        yield length

    def _prepare(self, directory: int, length: int) -> NewFile:
        """Make the new file, and try all that is to be done with it: see ``replacement``."""
        if self._fd >= 0:
            check_target(directory, self._place.name, self._fd)
        new = NewFile(directory)
        try:
            os.lseek(new.fd, length, os.SEEK_SET)  # EINVAL: more than the file system's files hold
            if self._fd >= 0:
                copy_attributes(self._fd, new.fd)
                new.hide()  # until it is complete
        except BaseException:
            new.close()
            raise
        return new

    def write(self, start: int, length: int, source: Source) -> Iterator[int]:
        """Range writes are not offered for files; the web layer refuses them first."""
        raise FileAccessError("range writes are not supported for files")

    def zero(self, start: int, length: int) -> Iterator[int]:
        """Zeroing is not offered for files; the web layer refuses it first."""
        raise FileAccessError("zeroing is not supported for files")

    def flush(self) -> None:
        """Sync the data, then the directory that names it (fsync(2))."""
        if self._is_replaced:
            return  # the new file and its name were synced before the old one gave way
        try:
            os.fsync(self._fd)
            if stat.S_ISREG(self._mode):
                directory = self._place.open_directory()
                try:
                    os.fsync(directory)
                finally:
                    close_fd(directory)
        except OSError as exc:
            raise failure(self._place.path, exc) from exc

    @property
    def dirty_bitmap(self) -> None:
        """Files have no bitmaps."""

    @property
    def tells_holes(self) -> bool:
        """Extents are not offered at all."""
        return False

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        """Extents are not offered for files; the web layer refuses them first."""
        raise FileAccessError("extents are not supported for files")

    def stop(self) -> None:
        """Nothing waits for a file but the kernel."""

    def close(self) -> None:
        """Close the file and its place."""
        self._place.close()
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if _has_name(fd):
            close_fd(fd)
        else:
            # The last reference to a file that was replaced: freeing it may take a while
            # (0.1 s a GiB on tmpfs), for which nobody needs to wait.
            closing = threading.Thread(target=close_fd, args=(fd,), name="close", daemon=True)
            try:
                closing.start()
            except RuntimeError:  # there is no thread
                close_fd(fd)


def _has_name(fd: int) -> bool:
    try:
        return os.fstat(fd).st_nlink > 0
    except OSError:  # not known: whoever has it closed waits perhaps
        return True


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
