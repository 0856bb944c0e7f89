# SPDX-License-Identifier: Apache-2.0
"""The state of an unfinished download: a small JSON file beside the file that is written.

A range is in it only after its bytes were synced, and the state is replaced as a whole: after
SIGKILL or loss of power it names less than was done, never more. It is used for an image of the
same size, extents and URL path only; whether the bytes are still the same is checked elsewhere.

The state of an incremental download also names the changes that are still missing: until they
are written, the file is half old, half new.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from imageserver.client.failures import LocalFailure
from imageserver.client.local.files import local_errors, sync_folder
from imageserver.client.plan import MIB, Range, Spans

_VERSION = 2
#: More missing spans than this are rounded to MiB: the state is written every two seconds.
_MAX_SPANS = 50_000


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be the same to resume a download; ``kind`` is ``Wanted.kind()``."""

    size: int
    digest: str
    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Saved:
    """A state: its image, ranges that are done, changes that are missing."""

    image: Identity
    done: list[Range]
    undone: list[Range]


def identity(size: int, kind: str, path: str, *spans: Spans) -> Identity:
    """Return the identity of an image with these extents at this path of a server."""
    digest = hashlib.sha256()
    for which in spans:
        digest.update(len(which).to_bytes(8, "big"))
        digest.update(which.raw())
    return Identity(size, digest.hexdigest(), kind, path)


class State:
    """The file at ``path``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def exists(self) -> bool:
        """Tell whether an earlier download left one."""
        return os.path.lexists(self.path)

    def load(self) -> Saved | None:
        """Return the state of an earlier run; None: there is none, or it cannot be read."""
        try:
            with open(self.path, "rb") as file:
                return parse(file.read())
        except OSError:
            return None

    def save(self, image: Identity, done: Sequence[Range], undone: Spans | None = None) -> None:
        """Write that these ranges are on stable storage, and that ``undone`` is still missing."""
        temporary = f"{self.path}.new"
        with local_errors(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # so that a link is not followed
            try:
                with open(temporary, "xb") as file:
                    file.write(encode(image, done, undone))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
            sync_folder(self.path)

    def spoil(self) -> None:
        """Make the state of an earlier run unreadable, which needs no room on the disk."""
        with local_errors(self.path):
            os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC))

    def remove(self) -> None:
        """Remove the file."""
        with local_errors(self.path), contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def require_whole(state: State, file: str, changed: Spans) -> None:
    """Refuse an incremental download that would leave ``file`` half old, half new.

    Raises:
        LocalFailure: changes that an earlier run did not write are not in ``changed``.
    """
    if not state.exists():
        return
    saved = state.load()
    if saved is None or Spans(saved.undone).without(changed).total:
        raise LocalFailure(
            f"{file} is half old, half new, and the changes that are offered "
            "do not make it whole: download all of it (--force)"
        )


def encode(image: Identity, done: Sequence[Range], undone: Spans | None = None) -> bytes:
    """Return a state as JSON."""
    if undone is not None and len(undone) > _MAX_SPANS:
        undone = undone.widened(MIB, image.size)
    fields = {
        "imagectl": _VERSION,
        "size": image.size,
        "extents": image.digest,
        "kind": image.kind,
        "path": image.path,
        "done": done,
        "undone": list(undone or ()),
    }
    return json.dumps(fields).encode() + b"\n"


def parse(text: bytes) -> Saved | None:
    """Parse a state; None if it is invalid, or of another version."""
    try:
        fields = json.loads(text)
        if fields["imagectl"] != _VERSION:
            return None
        image = Identity(fields["size"], fields["extents"], fields["kind"], fields["path"])
        done, undone = (
            [(start, stop) for start, stop in fields[name]] for name in ("done", "undone")
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if type(image.size) is not int or not (_can_be(done, image) and _can_be(undone, image)):
        return None
    return Saved(image, done, undone)


def _can_be(ranges: list[Range], image: Identity) -> bool:
    last = 0
    for start, stop in ranges:
        if type(start) is not int or type(stop) is not int or not last <= start < stop:
            return False
        last = stop
    return last <= image.size
