# SPDX-License-Identifier: Apache-2.0
"""Where an image file lies: the open directory that holds it, and its name there.

    path --realpath--> /root/a/b/image       says which root, and that there is no link left
    /root --openat a--> --openat b--> fd     O_NOFOLLOW each: Place(fd, "image")

Whoever may rename inside a root can exchange a directory for a link at any moment. So no
path below a root is opened whole: a component that has become a link since it was resolved is an
error, and whatever is done afterwards (open, temporary file, rename, sync) is done in ``fd``.
This needs nothing of ``openat2(2)``, for a resolved path has neither links nor ``..``.
Above a root, and where there are none, the kernel says at the end where ``fd`` lies: if a link
or a rename led elsewhere, that is an error as well, for another path was locked.

Paths are bytes: those of transfers are UTF-8 whatever the locale, and a link may lead to any.

What the kernel makes up, in /proc and /sys, is no image. Its links are not what they read as
(proc(5)): ``/proc/self/exe`` is the server's program, which a PUT would replace, and
``/proc/PID/root/image`` reads as ``/image``, which is another file. So neither the file nor a
link on the way to it may lie there.
"""

import errno
import functools
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Self

from imageserver.backends.descriptors import close_fd
from imageserver.backends.file.failures import failure
from imageserver.backends.file.kind import FileImage
from imageserver.backends.paths import resolved_name
from imageserver.core.errors import FileAccessError
from imageserver.core.transfer import path_bytes, path_text

if TYPE_CHECKING:
    import ctypes

#: The first word of struct statfs for what is no image (statfs(2)).
_MADE_UP = {0x9FA0: "proc", 0x62656572: "sysfs"}
#: In words; the struct has at most 15.
_STATFS_SIZE = 32
#: As many links as the kernel follows (path_resolution(7)).
_MOST_LINKS = 40
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Place:
    """A name in an open directory. Close it; closing twice is harmless."""

    def __init__(self, path: bytes, directory: int, name: bytes) -> None:
        """``path``: for messages; ``directory``: a descriptor (O_PATH), from now on ours."""
        self.path = path
        self.name = name
        self._directory = directory

    def stat(self) -> os.stat_result:
        """Return what has the name now; a link is a link (fstatat(2))."""
        return os.stat(self.name, dir_fd=self._directory, follow_symlinks=False)

    def open(self, flags: int) -> int:
        """Open the file; never a link, and never waiting for a FIFO's other end."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(self.name, flags, dir_fd=self._directory)

    def open_directory(self) -> int:
        """Open the directory so that it can be listed and synced."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return os.open(b".", flags, dir_fd=self._directory)

    def close(self) -> None:
        """Close the directory."""
        fd, self._directory = self._directory, -1
        if fd >= 0:
            close_fd(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def locate(image: FileImage, roots: tuple[bytes, ...]) -> Place:
    """Find an image's file as ``find`` does; one that is pinned where it was pinned, or not at all.

    Raises:
        FileAccessError: ``find`` raises it or fails, or the path's links lie in /proc or /sys.
    """
    named = path_bytes(image.path)
    path = image.at or named
    try:
        with ExitStack() as held:
            place = held.enter_context(find(path, roots))
            if place.path != named:
                refuse_made_up_links(named)
            if place.path != (image.at or place.path):
                raise FileAccessError(f"{path_text(path)} has become a link")
            held.pop_all()
    except OSError as exc:
        raise failure(path, exc) from exc
    return place


class Reached(NamedTuple):
    """A file that ``reach`` has found."""

    fd: int
    """O_PATH: see ``reopen``. Whoever has asked closes it."""
    path: bytes
    """Its real path."""
    found: os.stat_result


def reach(image: FileImage, roots: tuple[bytes, ...]) -> Reached:
    """Find an image's file by opening it as O_PATH.

    For who needs the file alone, and not its directory: the kernel says where what it has opened
    lies, and no later change of a path matters (``reopen``). Half the system calls of ``locate``.

    Raises:
        FileAccessError: there is none; it lies outside of all roots, or where no image is; or is
            elsewhere than where the image was pinned.
    """
    path = image.at or path_bytes(image.path)
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            return Reached(fd, _real_path(fd, found, image, roots), found)
        except BaseException:
            close_fd(fd)
            raise
    except OSError as exc:
        raise failure(path, exc) from exc


def _real_path(fd: int, found: os.stat_result, image: FileImage, roots: tuple[bytes, ...]) -> bytes:
    real = os.readlink(b"/proc/self/fd/%d" % fd)
    named = path_bytes(image.path)
    if not found.st_nlink or not real.startswith(b"/"):  # " (deleted)", "(unreachable)"
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if real != named:
        refuse_made_up_links(named)
    if real != (image.at or real):
        raise FileAccessError(f"{path_text(image.at or named)} has become a link")
    if roots and real not in roots and not any(real.startswith(_below(root)) for root in roots):
        raise _outside(real)
    if not os.major(found.st_dev):
        _refuse_made_up(fd, real)
    return real


def reopen(fd: int, flags: int) -> int:
    """Open the very file that ``fd``, an O_PATH descriptor, stands for (proc_pid_fd(5))."""
    return os.open(b"/proc/self/fd/%d" % fd, flags | os.O_CLOEXEC)


def may_write(fd: int) -> bool:
    """Tell whether that file may be written to, by its mode and its mount (access(2))."""
    return os.access(b"/proc/self/fd/%d" % fd, os.W_OK)


def find(path: bytes, roots: tuple[bytes, ...]) -> Place:
    """Find a file, which need not exist, in a directory, which must; anywhere without ``roots``.

    ``roots`` must be resolved.

    Raises:
        FileAccessError: it lies outside of all roots, in /proc or /sys, or is the root directory;
            or its directory is not the one that was resolved.
        OSError: a directory on the way cannot be opened, or has become a link.
    """
    real = resolved_name(path)
    name = os.path.basename(real)
    if not name:
        raise FileAccessError(f"{path_text(path)} is a directory")
    directory = _open_directory(real, roots)
    try:
        _require_at(directory, real)
        _refuse_made_up(directory, real)
    except BaseException:
        close_fd(directory)
        raise
    return Place(real, directory, name)


def _open_directory(real: bytes, roots: tuple[bytes, ...]) -> int:
    if not roots or real in roots:
        return _walk(os.path.dirname(real), [])
    for root in roots:
        prefix = _below(root)
        if real.startswith(prefix):
            return _walk(root, real[len(prefix) :].split(b"/")[:-1])
    raise _outside(real)


def _require_at(directory: int, real: bytes) -> None:
    if os.readlink(b"/proc/self/fd/%d" % directory) != os.path.dirname(real):
        raise FileAccessError(f"{path_text(real)} has become a link")


def _below(root: bytes) -> bytes:
    return root.rstrip(b"/") + b"/"


def _outside(real: bytes) -> FileAccessError:
    return FileAccessError(f"{path_text(real)} lies outside IMAGESERVER_FILE_ROOTS")


def _walk(start: bytes, parts: list[bytes]) -> int:
    """Open a directory from ``start`` down, a component at a time."""
    fd = os.open(start, _DIRECTORY)
    for part in parts:
        try:
            below = os.open(part, _DIRECTORY, dir_fd=fd)
        finally:
            close_fd(fd)
        fd = below
    return fd


def refuse_made_up_links(path: bytes) -> None:
    """Follow a path's links, all of which must lie on a file system that stores files.

    Raises:
        FileAccessError: one lies in /proc or /sys.
        OSError: the links have no end, or a directory cannot be opened.
    """
    at, rest, count = b"/", path.split(b"/")[::-1], 0
    while rest:
        part = rest.pop()
        if part in {b"", b"."}:
            continue
        if part == b"..":
            at = os.path.dirname(at)
            continue
        name = os.path.join(at, part)
        try:
            target = os.readlink(name)
        except OSError:  # no link
            at = name
            continue
        _refuse_made_up_in(at, name)
        count += 1
        if count > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if target.startswith(b"/"):
            at = b"/"
        rest += target.split(b"/")[::-1]


def _refuse_made_up_in(directory: bytes, path: bytes) -> None:
    fd = os.open(directory, _DIRECTORY)
    try:
        _refuse_made_up(fd, path)
    finally:
        close_fd(fd)


def _refuse_made_up(fd: int, path: bytes) -> None:
    found = os.fstat(fd)
    if found.st_blocks or os.major(found.st_dev):
        return  # it is stored; to ask NFS would take a round trip
    import ctypes  # noqa: PLC0415 - takes time, and many servers do without

    words = (ctypes.c_long * _STATFS_SIZE)()
    if _libc().fstatfs(fd, words) == 0 and words[0] in _MADE_UP:
        kind = _MADE_UP[words[0]]
        raise FileAccessError(f"{path_text(path)} lies in {kind}, where no image is")


@functools.cache
def _libc() -> "ctypes.CDLL":
    import ctypes  # noqa: PLC0415 - as in _refuse_made_up

    return ctypes.CDLL(None)
