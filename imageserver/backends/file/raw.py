# SPDX-License-Identifier: Apache-2.0
"""Files and block devices that are disks: what an NBD server would make of them, without one.

The disk is as large as the file was when it was opened. Nothing here makes it longer, and where
somebody else has made it shorter no byte is made up: that is an error, of a read, of a write and
of a list of extents alike. So it is where the file has lost its last name, be it removed or be
another one renamed over it: what is written is gone with the descriptor. Every write is one system
call or more of this process, so that none outlives it, and what one connection has written is
flushed by any other.
"""

import errno
import os
import stat
from collections.abc import Generator, Iterator, Sequence

from imageserver.backends.descriptors import close_fd
from imageserver.backends.file import holes, zeroing
from imageserver.backends.file.copying import copy
from imageserver.backends.file.failures import failure
from imageserver.backends.file.kind import FileImage
from imageserver.backends.file.pagecache import PageCache, Passage, neighbours
from imageserver.backends.file.places import Reached, may_write, reach, reopen
from imageserver.backends.file.state import is_unchanged, size_and_validators
from imageserver.core.errors import FileAccessError
from imageserver.core.extents import Extent
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Check, Intent, no_client
from imageserver.core.sources import Source
from imageserver.core.transfer import Transfer, path_text

#: What needs a descriptor that can be written to.
_WRITING = frozenset((Intent.WRITE, Intent.REPLACE))
#: Permissions, an immutable file, a device or file system that is read-only.
_READ_ONLY = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
#: Bytes per read of a stream: see ``image.py``. Measured: fresh memory for each takes 69 ms of CPU
#: a GiB, one buffer again and again 77 ms, for it has to be cleared first, and short reads 1 µs.
_READ_SIZE = 256 * 1024


class RawFiles:
    """Opens files that are disks; one for all requests."""

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
        check: Check = no_client,
        _transfer: Transfer | None = None,
    ) -> "RawFile":
        """Open a regular file or block device, which must be there.

        Raises:
            FileAccessError: it cannot be opened or sized, is something else, or lies
                outside the configured roots, or in /proc or /sys.
        """
        file = reach(image, self._roots)
        try:
            opened = RawFile(file, intent, self._chunk_size, check, keeps=not image.sparse)
        except OSError as exc:
            raise failure(file.path, exc) from exc
        finally:
            close_fd(file.fd)
        opened.pages = self._pages
        return opened

    def settle(self, image: FileImage, check: Check = no_client) -> None:
        """Return at once: the writes of a dead process end with it."""

    def drain(self) -> None:
        """Return at once: nothing is kept open."""


class RawFile:
    """One open disk: a ``ports.Backend``."""

    settled = True
    align = 1
    dirty_bitmap = None
    tells_holes = False
    pages = PageCache()

    def __init__(
        self, file: Reached, intent: Intent, chunk_size: int, check: Check, *, keeps: bool
    ) -> None:
        """Open a file that was found, for whatever it needs.

        Raises:
            OSError: open(2) or lseek(2) failed.
            FileAccessError: neither regular file nor block device.
        """
        self._path = file.path
        self._chunk = chunk_size
        self._check = check
        self._keeps = keeps
        self._is_device = stat.S_ISBLK(file.found.st_mode)
        if not self._is_device and not stat.S_ISREG(file.found.st_mode):
            name = path_text(file.path)
            raise FileAccessError(f"{name} is neither a regular file nor a block device")
        self._fd = -1
        read_only = False
        if intent in _WRITING:
            read_only = not self._open_to_write(file)
        elif intent is Intent.INSPECT:
            read_only = not may_write(file.fd)
        if self._fd < 0:
            self._fd = reopen(file.fd, os.O_RDONLY)
        try:
            self._found = file.found
            self.size, state = size_and_validators(self._fd, file.found)
        except BaseException:
            self.close()
            raise
        self.info = ImageInfo(
            *(self.size, read_only, True, True),  # it can be zeroed and flushed
            multi_conn=True,
            flushes_image=True,
            state=state,
            identity=(file.found.st_dev, file.found.st_ino),
        )

    def _open_to_write(self, file: Reached) -> bool:
        """Open the file, or return False where it may only be read."""
        try:
            self._fd = reopen(file.fd, os.O_RDWR)
        except OSError as exc:
            if exc.errno in _READ_ONLY:
                return False
            raise
        return True

    def _require_file(self) -> None:
        """Raise ``FileAccessError`` where the file has become shorter, or has no name any more."""
        if self._is_device:
            return  # the kernel itself refuses what lies behind the end
        now = os.fstat(self._fd)
        if now.st_size < self.size:
            raise self._shorter()
        if not now.st_nlink:  # it had one when it was found (``reach``)
            raise FileAccessError(f"{path_text(self._path)} was removed or replaced")

    def _shorter(self) -> FileAccessError:
        path = path_text(self._path)
        return FileAccessError(f"{path} has become shorter than {self.size} bytes")

    def is_unchanged(self) -> bool:
        """Tell whether the file has not been written to since it was opened."""
        return is_unchanged(self._path, self._fd, self._found)

    def read(self, start: int, length: int) -> Generator[memoryview]:
        """Yield ``length`` bytes from ``start``: see ``ports.Backend``."""
        stop = start + length
        with self.pages.reading(self._fd, start, stop) as passage:
            yield from self._read(start, stop, passage)

    def _read(self, at: int, stop: int, passage: Passage) -> Generator[memoryview]:
        while at < stop:
            try:
                data = os.pread(self._fd, min(_READ_SIZE, stop - at), at)
                passage.passed(at + len(data))
                self._require_file()
            except OSError as exc:
                raise failure(self._path, exc) from exc
            if not data:
                raise self._shorter()
            at += len(data)
            yield memoryview(data)

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Generator[memoryview]:
        """Yield the bytes of spans, one after the other."""
        for near in neighbours(spans):
            with self.pages.reading(self._fd, near[0][0], near[-1][1]) as passage:
                for start, stop in near:
                    yield from self._read(start, stop, passage)

    def write(self, start: int, length: int, source: Source) -> Iterator[int]:
        """Write ``length`` bytes from ``source`` at ``start``: see ``ports.Backend``."""
        with self.pages.writing(self._fd, start, start + length) as passage:
            put = passage.after(self._put)

            def write(data: memoryview, at: int) -> None:
                put(data, start + at)

            try:
                yield from copy(length, source, write, chunk=self._chunk, owner=self._path)
                self._require_file()
            except OSError as exc:
                raise failure(self._path, exc) from exc

    def replace(self, length: int, source: Source) -> Iterator[int]:
        """Write the whole disk, in place."""
        return self.write(0, length, source)

    def _put(self, data: memoryview, at: int) -> None:
        """Write all of ``data``, unless the file would have to grow for it."""
        try:
            while data:
                self._require_file()
                count = os.pwrite(self._fd, data, at)
                data, at = data[count:], at + count
        except OSError as exc:
            raise failure(self._path, exc) from exc

    def zero(self, start: int, length: int) -> Iterator[int]:
        """Zero a range of any length: see ``ports.Backend``."""
        stop = start + length
        zeroed = zeroing.zero(
            self._fd, start, stop, self._put, is_device=self._is_device, keeps=self._keeps
        )
        try:
            for at in zeroed:
                self._check()
                yield at - start
            self._require_file()
        except OSError as exc:
            raise failure(self._path, exc) from exc

    def flush(self) -> None:
        """Sync the data, then the directory that names the file: it may be as new as they are."""
        try:
            os.fdatasync(self._fd)
            if not self._is_device:
                self._sync_name()
            self._require_file()
        except OSError as exc:
            raise failure(self._path, exc) from exc

    def _sync_name(self) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            directory = os.open(os.path.dirname(self._path), flags)
        except (PermissionError, FileNotFoundError):
            return  # the name is its maker's, and the data are safe
        try:
            os.fsync(directory)
        finally:
            close_fd(directory)

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        """Yield the extents of [start, stop): see ``ports.Backend``. Files have no bitmap."""
        try:
            for batch in holes.list_extents(
                self._fd, start, stop, dirty=dirty, check=self._require_file
            ):
                self._require_file()
                yield batch
                self._check()
        except OSError as exc:
            raise failure(self._path, exc) from exc

    def stop(self) -> None:
        """Nothing waits for a file but the kernel."""

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)
