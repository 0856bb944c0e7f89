# SPDX-License-Identifier: Apache-2.0
"""Where an image file lies: the open directory that holds it, and its name there.

    path --realpath--> /root/a/b/image       says which root, and that there is no link left
    /root --openat a--> --openat b--> fd     O_NOFOLLOW each: Place(fd, "image")

Whoever may rename inside a root can exchange a directory for a link at any moment. So no
path is opened whole: a component that has become a link since it was resolved is an error,
and whatever is done afterwards (open, temporary file, rename, sync) is done in ``fd``.
This needs nothing of ``openat2(2)``, for a resolved path has neither links nor ``..``.

Paths are bytes: those of transfers are UTF-8 whatever the locale, and a link may lead to any.
"""

import os
from typing import Self

from imageserver.core.errors import FileAccessError
from imageserver.core.transfer import path_text

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
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def find(path: bytes, roots: tuple[bytes, ...]) -> Place:
    """Find a file, which need not exist, in a directory, which must; anywhere without ``roots``.

    ``roots`` must be resolved.

    Raises:
        FileAccessError: it lies outside of all roots, or is the root directory.
        OSError: a directory on the way cannot be opened, or has become a link.
    """
    real = os.path.realpath(path)
    directory, name = os.path.split(real)
    if not name:
        raise FileAccessError(f"{path_text(path)} is a directory")
    if not roots or real in roots:
        return Place(real, _walk(directory, []), name)
    for root in roots:
        prefix = root.rstrip(b"/") + b"/"
        if real.startswith(prefix):
            return Place(real, _walk(root, real[len(prefix) :].split(b"/")[:-1]), name)
    raise FileAccessError(f"{path_text(real)} lies outside IMAGESERVER_FILE_ROOTS")


def _walk(start: bytes, parts: list[bytes]) -> int:
    """Open a directory from ``start`` down, a component at a time."""
    fd = os.open(start, _DIRECTORY)
    for part in parts:
        try:
            below = os.open(part, _DIRECTORY, dir_fd=fd)
        finally:
            os.close(fd)
        fd = below
    return fd
