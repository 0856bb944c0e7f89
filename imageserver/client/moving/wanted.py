# SPDX-License-Identifier: Apache-2.0
"""What to download and where to, and what is refused before the server is asked.

Refused are targets that are no regular files, bases that are incomplete, and bases that the
download itself would write.
"""

import os
from dataclasses import dataclass

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import local_errors
from imageserver.client.local.formats import refuse_below
from imageserver.client.moving.made import Made


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to download, and how."""

    file: str
    format: str = "raw"
    connections: int | None = None
    incremental: bool = False
    base: str | None = None
    base_format: str | None = None
    verify: bool = False
    force: bool = False
    restart: bool = False
    patience_seconds: float = 60.0
    made: Made | None = None
    """The server makes the file, which is downloaded as it is: ``format`` is raw."""

    @property
    def in_place(self) -> bool:
        """Whether FILE itself is written, which must exist."""
        return self.incremental and self.base is None

    @property
    def part(self) -> str:
        """The file that is written unless FILE itself is."""
        return f"{self.file}.part"

    def kind(self) -> str:
        """Return what a state must agree with: format, way, and the base as it is now."""
        if self.base:
            with local_errors(self.base):
                base = os.stat(self.base)
            path = os.path.abspath(self.base)
            return f"{self.format} overlay of {path}, {base.st_size}, {base.st_mtime_ns}"
        if self.made:
            return f"qcow2 file {self.made.etag}"
        return f"{self.format} {'incremental' if self.incremental else 'full'}"


def check_file(wanted: Wanted) -> None:
    """Refuse a download whose FILE or base cannot be right."""
    if not wanted.file:
        raise LocalFailure("FILE is empty: name the file to write")
    exists = os.path.lexists(wanted.file)
    require_replaceable(wanted.file)
    if wanted.in_place and not exists:
        raise LocalFailure(f"{wanted.file} is not there: download all of it first")
    if exists and not wanted.in_place and not wanted.force:
        raise LocalFailure(f"{wanted.file} exists: --force replaces it")
    if wanted.in_place:
        require_one_name(wanted.file)
    if wanted.base:
        _check_base(wanted, wanted.base)


def require_replaceable(file: str) -> None:
    """Refuse to replace devices, FIFOs, /dev/stdout, and links to them."""
    if os.path.lexists(file) and not os.path.isfile(file):
        raise LocalFailure(f"{file} is no regular file")
    step = file
    while os.path.islink(step):
        step = os.path.join(os.path.dirname(step), os.readlink(step))
        if os.path.realpath(os.path.dirname(step)).startswith("/proc/"):
            raise LocalFailure(f"{file} is what a program has open, by {step}: name a file")


def require_one_name(file: str) -> None:
    """Refuse to start writing a file with hard links: its state is found by one name only."""
    with local_errors(file):
        names = os.stat(file).st_nlink
    if names > 1 and not os.path.lexists(half_state(file)):
        raise LocalFailure(
            f"{file} is a file of {names} names (hard links), and the others would not show "
            "that it is half old, half new: cp it, and download into the copy"
        )


def _check_base(wanted: Wanted, base: str) -> None:
    if is_half(base):
        raise LocalFailure(f"{base} is half old, half new: it can be no base")
    full = os.path.realpath(base)
    if full.endswith(".part") and os.path.lexists(f"{full}.state"):
        raise LocalFailure(f"{base} is the rest of an interrupted download: it can be no base")
    for written in (wanted.file, wanted.part):
        if os.path.exists(written):
            with local_errors(base):
                if os.path.samefile(base, written):
                    raise LocalFailure(f"{base} is {written}: an image can be no base of itself")
            if wanted.base_format == "qcow2":
                refuse_below(base, written)


def is_half(path: str) -> bool:
    """Tell whether a file is half old, half new."""
    return os.path.lexists(half_state(path)) or os.path.lexists(state_beside(path))


def half_state(path: str) -> str:
    """Return where the state of a file that is written in place lies: beside its real name."""
    return state_beside(os.path.realpath(path))


def state_beside(path: str) -> str:
    """Return where such a state would lie for exactly this name."""
    return f"{path}.incremental.state"
