# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image and all that it says lies outside of it: each file opened once, by imagectl.

    image.qcow2 --"middle", qcow2--> middle --"/base", raw--> /base    followed to its end
                --"base"-----------> ?                                 refused: QEMU would guess

QEMU's programs get descriptors (``/proc/self/fd``) and the whole chain in words, so they follow
no name of a backing file: one that is put in another's place after its header was read is not
opened. What no option keeps QEMU from following, a header rewritten meanwhile to name a file for
its data, is found out once the image is open, before a byte of it is used (``require_as_read``).

A raw image holds whatever its guest wrote, a qcow2 header too, and that may name any file. So
each link must record the format of what it names: with one that does not, QEMU looks into the
file and believes it.

What a link names through a protocol (``nbd:``, ``json:``) ends what is followed here: QEMU opens
that by the name that was read (``Chain.beyond``).
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import local_errors, opened, read_at
from imageserver.client.local.qcow2_header import LARGEST_CLUSTER, Header, parse_header

#: More images than any chain has: this one leads in a circle, which QEMU follows for ever.
_MAX_DEPTH = 200
#: Formats whose own backing files can be told: raw has none.
_FOLLOWED = {"raw", "qcow2"}


class OpenFile:
    """A file that was opened once; QEMU's programs open the same one through its descriptor."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._before = os.fstat(fd)
        self._is_file = stat.S_ISREG(self._before.st_mode)

    @classmethod
    def open(cls, path: str, *, writable: bool = False, ours: os.stat_result | None = None) -> Self:
        """Open what is there (``opened``)."""
        return cls(path, opened(path, os.O_RDWR if writable else os.O_RDONLY, ours))

    @classmethod
    def create(cls, path: str, ours: os.stat_result | None = None) -> Self:
        """Open a file to be made anew; a symbolic link is not followed."""
        return cls(path, opened(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, ours))

    def header(self) -> Header:
        """Return the qcow2 header that it has."""
        return parse_header(self.read(0, LARGEST_CLUSTER))

    def node(self) -> dict[str, object]:
        """Return what QEMU calls a protocol node."""
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
        """Tell whether nobody has written it since, not even what was there before.

        Times are those of the kernel's clock tick: two writes in one look like one.
        """
        now, before = os.fstat(self.fd), self._before
        return (now.st_size, now.st_ctime_ns) == (before.st_size, before.st_ctime_ns)

    def require_unchanged(self) -> None:
        """Require a file to be as it was: QEMU reads behind the end of a shorter one as zeros.

        Raises:
            LocalFailure: it was written, or cut.
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

    def node(self) -> dict[str, object]:
        """Return what QEMU calls a format node, without what it is based on."""
        node: dict[str, object] = {"driver": "qcow2" if self.header else "raw"}
        node["file"] = self.file.node()
        if self.data_file:
            node["data-file"] = self.data_file.node()
        if self.header:
            node["backing"] = None
        return node

    def is_as_read(self) -> bool:
        """Tell whether its header is what it was, and was nothing else meanwhile."""
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
    """The images, topmost first; ``beyond``: name and format of what no path leads to."""

    members: list[Member] = field(default_factory=list)
    beyond: tuple[str, str] | None = None

    @classmethod
    def open(
        cls,
        path: str,
        kind: str = "qcow2",
        *,
        writable: bool = False,
        backing: bool = True,
        ours: os.stat_result | None = None,
    ) -> Self:
        """Open the image at ``path``, and with ``backing`` all that it is based on.

        The topmost must be the file that is ``ours``, if that is said.

        Raises:
            LocalFailure: something cannot be opened, its format would be guessed, or without
                ``backing`` there is something.
        """
        chain = cls()
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
        self.members.append(Member(file, None))  # is closed whatever comes
        if kind == "raw":
            return None
        header = file.header()
        self.members[-1] = Member(file, header)
        return header

    def _add_data_file(self, image: str, header: Header) -> None:
        if not header.has_data_file or not header.data_file:
            return  # QEMU will say what lacks
        path = _path_of(image, header.data_file)
        if path is None:
            raise LocalFailure(
                f"{_shown(image)} has its data behind {header.data_file!r}: "
                "imagectl follows paths only"
            )
        file = self.members[-1].file
        self.members[-1] = Member(file, header, OpenFile.open(path))

    def _next(self, image: str, header: Header) -> tuple[str | None, str]:
        """Return path and format of what this image is based on; None where no path leads on."""
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
                f"{header.format!r}, which may name others: imagectl follows raw and qcow2 only"
            )
        path = _path_of(image, header.backing)
        if path is None:
            self.beyond = header.backing, header.format
        return path, header.format

    def node(self, beyond: dict[str, Any] | None = None) -> dict[str, object]:
        """Return the whole chain as QEMU's nodes; ``beyond`` is that of what no path leads to."""
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
        """Require what QEMU has just opened, from member ``first`` on, to be what was read here.

        Raises:
            LocalFailure: a header names something else now, or did meanwhile.
        """
        for member in self.members[first:]:
            if not member.is_as_read():
                raise LocalFailure(f"{member.file.path} was changed while it was opened")

    def require_unchanged(self, first: int = 0) -> None:
        """Require all files, from member ``first`` on, to be as they were opened."""
        for member in self.members[first:]:
            for file in member.files():
                file.require_unchanged()

    def close(self) -> None:
        """Close all files; may be called twice."""
        for file in self.files():
            file.close()
        self.members = []


def _refuse_outside(path: str, header: Header) -> None:
    """Refuse an image whose content lies elsewhere too."""
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
    """Return the path that ``name`` in an image stands for; None where QEMU sees no path in it."""
    protocol, colon, rest = name.partition(":")
    if colon and "/" not in protocol:
        return rest if protocol == "file" else None
    return os.path.join(os.path.dirname(image), name)
