# SPDX-License-Identifier: Apache-2.0
"""What a FILE of ``share`` is: checked, so that qemu-nbd needs to be believed in little.

    a path               its format by its header, or by --format; opened once, given to QEMU as
                         a descriptor; a qcow2 chain as imagectl opens it (``client.local``)
    ... of a raw file    served by the server itself, with QEMU's lock held here
    https:..., rbd:...   with --allow-remote only: QEMU opens it by its name

Whatever is refused here is a ``LocalFailure``, before anything has been started.
"""

import errno
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

from imageserver.client.failures import LocalFailure
from imageserver.client.local.qcow2 import linked
from imageserver.client.local.qcow2_chain import KEY, Chain, OpenFile
from imageserver.client.local.qcow2_check import require_sound
from imageserver.client.local.qcow2_header import QCOW2_MAGIC
from imageserver.client.local.qemu_programs import (
    LOCKED,
    Names,
    as_filename,
    program,
    reason,
    run,
)
from imageserver.sharing.image_lock import hold

#: Formats that can be shared, by what their files have at an offset. Others may name further
#: files, and are not followed.
_MAGIC = {
    "qcow2": (QCOW2_MAGIC, 0),
    "luks": (b"LUKS\xba\xbe", 0),
    "vhdx": (b"vhdxfile", 0),
    "vpc": (b"conectix", 0),
    "vdi": (b"\x7f\x10\xda\xbe", 64),
}
FORMATS = ("raw", *_MAGIC)
#: ... and those that cannot.
_OTHERS = (
    ("VMDK", (b"KDMV", 0)),
    ("VMDK", (b"# Disk Descriptor", 0)),
    ("QED", (b"QED\0", 0)),
    ("qcow version 1", (QCOW2_MAGIC + b"\0\0\0\1", 0)),
)
_HEAD_BYTES = 512
#: As QEMU tells a protocol from a path (``path_has_protocol``).
_PROTOCOL = re.compile(r"[^/:]+:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line says of all FILEs."""

    read_only: bool = False
    bitmap: str | None = None
    format: str | None = None
    secret_file: str | None = None
    allow_remote: bool = False


@dataclass(slots=True)
class Source:
    """One FILE, checked, and how qemu-nbd gets it; or the server, if it is ``direct``."""

    name: str
    kind: str
    size: int
    filename: str
    """qemu-nbd's last argument."""
    options: list[str] = field(default_factory=list)
    chain: Chain = field(default_factory=Chain)
    direct: str | None = None
    """The path of a raw file, which needs no qemu-nbd; its lock is held until it is closed."""

    @property
    def names(self) -> Names:
        """The descriptors that qemu-nbd gets, and the paths that they stand for."""
        return {file.fd: file.path for file in self.chain.files()}

    def close(self) -> None:
        """Close the files; may be called twice."""
        self.chain.close()


def open_sources(
    files: Sequence[str], wanted: Wanted, directory: str, sources: list[Source]
) -> None:
    """Open and check all FILEs; whoever has ``sources`` closes what is in there, in any case.

    Raises:
        LocalFailure: one is not what it should be, or is named twice.
    """
    _refuse_twice(files)
    for name in files:
        if _is_remote(name):
            found = _remote(name, wanted)
        else:
            found = _local(name, wanted, os.path.join(directory, f"{len(sources)}.chain"))
        sources.append(found)
    if not wanted.read_only:
        _refuse_bases(sources)


def _refuse_twice(files: Sequence[str]) -> None:
    for name, other in combinations(files, 2):
        both = os.path.exists(name) and os.path.exists(other)
        if name == other or (both and os.path.samefile(name, other)):
            raise LocalFailure(f"{other} is {name} once more: name each image once")


def _refuse_bases(sources: Sequence[Source]) -> None:
    """Refuse to share for writing what another FILE is based on: its disk would change as well."""
    for source, other in permutations(sources, 2):
        _, *below = source.chain.files() if source.chain.members else (None,)
        if os.path.exists(other.name) and any(
            file.is_same_as(os.stat(other.name)) for file in below
        ):
            raise LocalFailure(
                f"{source.name} is based on {other.name}: what is written to that would change "
                "both; share one of them, or both with --read-only"
            )


# Paths


def _local(name: str, wanted: Wanted, directory: str) -> Source:
    _refuse_unwritable(name, wanted)
    kind = _format(name, wanted.format)
    chain = Chain.open(
        name,
        "qcow2" if kind == "qcow2" else "raw",
        writable=not wanted.read_only,
        secret_file=wanted.secret_file,
    )
    try:
        return _checked(name, kind, chain, wanted, directory)
    except BaseException:
        chain.close()
        raise


def _checked(name: str, kind: str, chain: Chain, wanted: Wanted, directory: str) -> Source:
    if chain.beyond is not None and not wanted.allow_remote:
        raise LocalFailure(
            f"{name} is based on {chain.beyond[0]!r}, which is no path and cannot be checked: "
            "--allow-remote lets QEMU open it"
        )
    direct = _direct_path(name) if kind == "raw" else None
    if direct is None:
        program("qemu-nbd")  # missing: said before anything is read
    elif not hold(chain.members[0].file.fd, writable=not wanted.read_only):
        only_read = not wanted.read_only and hold(chain.members[0].file.fd, writable=False)
        raise _in_use(name, only_read=only_read)
    _require_passphrase(name, kind, chain)
    require_sound(chain)
    node = _node(kind, chain, directory)
    size = _require_opened(name, kind, chain) if kind != "raw" else chain.members[0].file.length()
    if wanted.bitmap is not None:
        _require_bitmap(name, wanted.bitmap, chain)
    return Source(name, kind, size, as_filename(node), chain.objects, chain, direct)


def _direct_path(name: str) -> str | None:
    """Return the path as a transfer can have it, if it can."""
    path = os.path.abspath(name)
    is_text = not any("\ud800" <= character <= "\udfff" for character in path)
    return path if is_text and path == path.strip() else None


def _require_readable(name: str) -> None:
    try:
        os.close(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as exc:
        raise LocalFailure(f"{name}: {exc.strerror}") from exc


def _refuse_unwritable(name: str, wanted: Wanted) -> None:
    if os.path.exists(name) and not os.access(name, os.R_OK):
        raise LocalFailure(f"{name}: {os.strerror(errno.EACCES)}")
    if not wanted.read_only and os.path.exists(name) and not os.access(name, os.W_OK):
        raise LocalFailure(f"{name} cannot be written: --read-only shares it for reading")


def _format(name: str, said: str | None) -> str:
    """Return a file's format: what its header says, where the command line agrees; or raw."""
    if said == "raw":
        return said
    head = _head(name)
    found = next((kind for kind, magic in _MAGIC.items() if head.startswith(*magic)), "raw")
    if said not in {None, found, "vpc"}:  # fixed VPC images end in a footer
        raise LocalFailure(f"{name} is not {said}: by its header it is {found}")
    if said is None:
        _refuse_others(name, head)
    return said or found


def _refuse_others(name: str, head: bytes) -> None:
    for other, magic in _OTHERS:
        if head.startswith(*magic):
            raise LocalFailure(
                f"{name} looks like {other}, which is not shared: qemu-img convert makes "
                "a qcow2 image of it; --format raw shares the bytes of the file"
            )


def _head(name: str) -> bytes:
    file = OpenFile.open(name)
    try:
        return file.read(0, _HEAD_BYTES)
    finally:
        file.close()


def _require_passphrase(name: str, kind: str, chain: Chain) -> None:
    headers = [member.header for member in chain.members if member.header]
    is_luks = kind == "luks" or any(header.is_luks for header in headers)
    if is_luks and chain.secret_file is None:
        raise LocalFailure(f"{name} is encrypted (LUKS): --secret-file names its passphrase's file")
    if is_luks:
        _require_readable(str(chain.secret_file))


def _node(kind: str, chain: Chain, directory: str) -> dict[str, Any]:
    """Return the image as QEMU's nodes."""
    if chain.beyond is not None:
        os.mkdir(directory, mode=0o700)
    node: dict[str, Any] = chain.node(linked(chain, directory))
    if kind not in {"raw", "qcow2"}:
        node["driver"] = kind
    if kind == "luks":
        node["key-secret"] = KEY
    return node


def _require_opened(name: str, kind: str, chain: Chain) -> int:
    """Have QEMU open the image, without what it is based on; return the disk's size in bytes."""
    said = _info(name, kind, chain, 0)
    return int(said["virtual-size"])


def _info(name: str, kind: str, chain: Chain, number: int) -> dict[str, Any]:
    member = chain.members[number]
    node = member.node()
    if kind not in {"raw", "qcow2"}:
        node |= {"driver": kind} | ({"key-secret": KEY} if kind == "luks" else {})
    names = {file.fd: file.path for file in member.files()}
    return info(name, [*chain.objects, as_filename(node)], names)


def info(name: str, arguments: list[str], names: Names) -> dict[str, Any]:
    """Return what ``qemu-img info`` says.

    Raises:
        LocalFailure: QEMU cannot open the image.
    """
    status, output, said = run("qemu-img", ["info", "--output=json", *arguments], names)
    if status:
        raise refusal(name, said, names)
    found: dict[str, Any] = json.loads(output)
    return found


def refusal(name: str, said: str, names: Names, *, could_be_read: bool = False) -> LocalFailure:
    """Return what one of QEMU's programs has said about an image, as one sentence."""
    if LOCKED.search(said):
        return _in_use(name, only_read=could_be_read)
    return LocalFailure(f"{name} cannot be opened: {reason(said, names) or 'QEMU says not why'}")


def _in_use(name: str, *, only_read: bool) -> LocalFailure:
    if only_read:
        return LocalFailure(
            f"{name} is read by another program, as its lock tells: --read-only shares it"
        )
    return LocalFailure(f"{name} is in use by another program, as its lock tells")


def _require_bitmap(name: str, bitmap: str, chain: Chain) -> None:
    found: list[str] = []
    for number, member in enumerate(chain.members):
        if member.header is not None:
            said = _info(name, "qcow2", chain, number)
            data = said.get("format-specific", {}).get("data", {})
            found += [each["name"] for each in data.get("bitmaps", ())]
    if bitmap not in found:
        has = f"it has {', '.join(sorted(set(found)))}" if found else "it has none"
        raise LocalFailure(f"{name} has no bitmap {bitmap!r}: {has}")


# Remote sources


def _is_remote(name: str) -> bool:
    return _PROTOCOL.match(name) is not None and not os.path.exists(name)


def _remote(name: str, wanted: Wanted) -> Source:
    if not wanted.allow_remote:
        raise LocalFailure(
            f"{name} is no file here: --allow-remote lets QEMU open it, whatever it names"
        )
    program("qemu-nbd")
    said = info(name, [*(["-f", wanted.format] if wanted.format else []), name], {})
    kind = str(said["format"])
    data = said.get("format-specific", {}).get("data", {})
    if kind not in {"raw", "qcow2"} or said.get("encrypted"):
        raise LocalFailure(f"{name} is {kind}, of which only files here are shared")
    if "backing-filename" in said or "data-file" in data:
        raise LocalFailure(f"{name} names other files, which only a file here may")
    names = [each["name"] for each in data.get("bitmaps", ())]
    if wanted.bitmap is not None and wanted.bitmap not in names:
        has = f"it has {', '.join(names)}" if names else "it has none"
        raise LocalFailure(f"{name} has no bitmap {wanted.bitmap!r}: {has}")
    return Source(name, kind, int(said["virtual-size"]), name, [f"--format={kind}"])
