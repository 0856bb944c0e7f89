# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image and the files that it names: each opened once, by imagectl.

    image.qcow2 --"middle", qcow2--> middle --"/base", raw--> /base    followed to its end
                --"base"-----------> ?                                 refused: no format

QEMU's programs get descriptors (``/proc/self/fd``) and a description of the whole chain, so they
open no backing file by its name: a file that replaces another one after its header was read is
not opened. Only the name of a data file cannot be kept from QEMU: a header that is rewritten
meanwhile to name one is detected after QEMU has opened the image, and before a byte of it is
used (``require_as_read``).

The guest writes a raw image, so it may write a qcow2 header that names any file of this host.
Each image must therefore record the format of its backing file: without, QEMU would detect it
from the content.

A backing file behind a protocol (``nbd:``, ``json:``) is not followed: QEMU opens it by the name
that was read (``Chain.beyond``).
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import local_errors, opened, read_at
from imageserver.client.local.qcow2_header import LARGEST_CLUSTER, Header, parse_header

#: More images than any chain has: QEMU would follow a circle for ever.
_MAX_DEPTH = 200
#: The id of the QEMU object that has the passphrase.
KEY = "key0"
#: Formats of backing files that are followed: the chain of raw ends, that of qcow2 can be read.
_FOLLOWED = {"raw", "qcow2"}


class OpenFile:
    """A file that was opened once; QEMU's programs open it again through its descriptor."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._before = os.fstat(fd)
        self._is_file = stat.S_ISREG(self._before.st_mode)

    @classmethod
    def open(cls, path: str, *, writable: bool = False, ours: os.stat_result | None = None) -> Self:
        """Open a file that exists (``files.opened``)."""
        return cls(path, opened(path, os.O_RDWR if writable else os.O_RDONLY, ours))

    @classmethod
    def create(cls, path: str, ours: os.stat_result | None = None) -> Self:
        """Open a file that is made if there is none; a symbolic link is not followed."""
        return cls(path, opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, ours))

    def header(self) -> Header:
        """Return its qcow2 header, as it is now."""
        return parse_header(self.read(0, LARGEST_CLUSTER))

    def node(self) -> dict[str, object]:
        """Return its protocol node in QEMU's terms."""
        driver = "file" if self._is_file else "host_device"
        return {"driver": driver, "filename": f"/proc/self/fd/{self.fd}"}

    def length(self) -> int:
        """Return its length now, in bytes."""
        with local_errors(self.path):
            return os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, start: int, length: int) -> bytes:
        """Return bytes; fewer only at the end."""
        with local_errors(self.path):
            return read_at(self.fd, start, length)

    def is_same_as(self, other: os.stat_result) -> bool:
        """Tell whether that is this file."""
        return os.path.samestat(self._before, other)

    def is_untouched(self) -> bool:
        """Tell whether nobody has written to it since, even the same bytes.

        The kernel's times advance by clock ticks: a write in the tick of the opening is missed.
        """
        now, before = os.fstat(self.fd), self._before
        return (now.st_size, now.st_ctime_ns) == (before.st_size, before.st_ctime_ns)

    def require_unchanged(self) -> None:
        """Require the file not to have been written; QEMU reads zeros behind a shorter end.

        Raises:
            LocalFailure: it was written or truncated.
        """
        now = os.fstat(self.fd)
        if self._is_file and (now.st_size, now.st_mtime_ns) != (
            self._before.st_size,
            self._before.st_mtime_ns,
        ):
            raise LocalFailure(f"{self.path} was changed while it was read")

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


@dataclass(frozen=True, slots=True)
class Member:
    """One image of a chain; a raw one has no header."""

    file: OpenFile
    header: Header | None
    data_file: OpenFile | None = None
    secret: str | None = None
    """The QEMU object that has the passphrase, where it is encrypted."""

    def node(self) -> dict[str, object]:
        """Return its format node in QEMU's terms, without a backing file."""
        node: dict[str, object] = {"driver": "qcow2" if self.header else "raw"}
        node["file"] = self.file.node()
        if self.data_file:
            node["data-file"] = self.data_file.node()
        if self.header:
            node["backing"] = None
        if self.header and self.header.is_luks and self.secret:
            node["encrypt"] = {"format": "luks", "key-secret": self.secret}
        return node

    def is_as_read(self) -> bool:
        """Tell whether its header is what it was, and was not changed in between."""
        if self.header is None:
            return True
        return self.file.header() == self.header and self.file.is_untouched()

    def files(self) -> Iterator[OpenFile]:
        """Yield its file, and the one for its data."""
        yield self.file
        if self.data_file:
            yield self.data_file


@dataclass(slots=True)
class Chain:
    """The images, topmost first; ``beyond``: name and format of a backing file that is no path."""

    members: list[Member] = field(default_factory=list)
    beyond: tuple[str, str] | None = None
    secret_file: str | None = None

    @property
    def objects(self) -> list[str]:
        """QEMU's options that define the objects which the nodes name."""
        if self.secret_file is None:
            return []
        path = os.path.abspath(self.secret_file).replace(",", ",,")
        return ["--object", f"secret,id={KEY},file={path}"]

    @classmethod
    def open(  # noqa: PLR0913 - options of one image
        cls,
        path: str,
        kind: str = "qcow2",
        *,
        writable: bool = False,
        backing: bool = True,
        ours: os.stat_result | None = None,
        secret_file: str | None = None,
    ) -> Self:
        """Open the image at ``path``, and with ``backing`` its backing files.

        ``ours``: the file that ``path`` must lead to. ``secret_file``: has the passphrase of those
        that are encrypted.

        Raises:
            LocalFailure: a file cannot be opened, a format is not recorded, or ``backing`` is
                false and the image names other files.
        """
        chain = cls(secret_file=secret_file)
        try:
            header = chain._add(path, kind, writable=writable, ours=ours)
            if header and not backing:
                _refuse_outside(path, header)
            chain._follow(path, header)
        except BaseException:
            chain.close()
            raise
        return chain

    def _follow(self, image: str, header: Header | None) -> None:
        while header is not None:
            self._add_data_file(image, header)
            below, kind = self._next(image, header)
            if below is None:
                return
            if len(self.members) == _MAX_DEPTH:
                top = self.members[0].file.path
                raise LocalFailure(f"{top} is based on more than {_MAX_DEPTH} images, or on itself")
            image, header = below, self._add(below, kind)

    def _add(
        self, path: str, kind: str, *, writable: bool = False, ours: os.stat_result | None = None
    ) -> Header | None:
        """Open an image; return its header, if it has one."""
        file = OpenFile.open(path, writable=writable, ours=ours)
        self.members.append(Member(file, None))  # so that it is closed if its header cannot be read
        if kind == "raw":
            return None
        header = file.header()
        self.members[-1] = Member(file, header, secret=KEY if self.secret_file else None)
        return header

    def _add_data_file(self, image: str, header: Header) -> None:
        if not header.has_data_file or not header.data_file:
            return  # QEMU will report it
        path = _path_of(image, header.data_file)
        if path is None:
            raise LocalFailure(
                f"{_shown(image)} has its data behind {header.data_file!r}: only paths are followed"
            )
        self.members[-1] = replace(self.members[-1], data_file=OpenFile.open(path))

    def _next(self, image: str, header: Header) -> tuple[str | None, str]:
        """Return path and format of the backing file; None: there is none, or it is no path."""
        if not header.backing:
            return None, ""
        if not header.format:
            raise LocalFailure(
                f"{_shown(image)} has the backing file {header.backing!r}, but does not record its "
                "format, which would be guessed: "
                "qemu-img rebase -u -f qcow2 -F FORMAT -b NAME FILE records it"
            )
        if header.format not in _FOLLOWED:
            raise LocalFailure(
                f"{_shown(image)} has the backing file {header.backing!r} of format "
                f"{header.format!r}, which may name others: only raw and qcow2 are followed"
            )
        path = _path_of(image, header.backing)
        if path is None:
            self.beyond = header.backing, header.format
        return path, header.format

    def node(self, beyond: dict[str, Any] | None = None) -> dict[str, object]:
        """Return the whole chain as QEMU's nodes; ``beyond`` is the node of ``Chain.beyond``."""
        below = beyond
        for member in reversed(self.members):
            node = member.node()
            if below is not None:
                node["backing"] = below
            below = node
        assert below is not None  # noqa: S101 - for the types: a chain has members
        return below

    def files(self) -> Iterator[OpenFile]:
        """Yield all files."""
        for member in self.members:
            yield from member.files()

    def require_as_read(self, first: int = 0) -> None:
        """Require the headers that QEMU has read, from member ``first`` on, to be those read here.

        Raises:
            LocalFailure: one was changed in between.
        """
        for member in self.members[first:]:
            if not member.is_as_read():
                raise LocalFailure(f"{member.file.path} was changed while it was opened")

    def require_unchanged(self, first: int = 0) -> None:
        """Require all files, from member ``first`` on, not to have been written."""
        for member in self.members[first:]:
            for file in member.files():
                file.require_unchanged()

    def close(self) -> None:
        """Close all files; may be called twice."""
        for file in self.files():
            file.close()
        self.members = []


def _refuse_outside(path: str, header: Header) -> None:
    """Refuse an image that names other files."""
    if header.backing is not None:
        raise LocalFailure(
            f"{path} has the backing file {header.backing!r}: "
            "--backing uploads what that holds as well"
        )
    if header.has_data_file:
        raise LocalFailure(
            f"{path} has its data in another file, which it names: "
            "--backing uploads what that holds"
        )


def _shown(path: str) -> str:
    return path if path.isprintable() else repr(path)


def _path_of(image: str, name: str) -> str | None:
    """Return the path that ``name`` in an image means; None: QEMU takes it for a protocol."""
    protocol, colon, rest = name.partition(":")
    if colon and "/" not in protocol:
        return rest if protocol == "file" else None
    return os.path.join(os.path.dirname(image), name)
