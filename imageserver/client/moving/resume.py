# SPDX-License-Identifier: Apache-2.0
"""What is left of an interrupted download: a small JSON file beside what was written so far.

A range counts as done only when its bytes were synced *before* this file says so, and this file
is replaced as a whole: after SIGKILL or loss of power it says less than was done, never more.
It fits an image of the same size, extents and URL path only; that the bytes are still the same
is for others to find out.

Of a download into a file that exists it also names what was to be changed and is not: until
that is done, the file is half old, half new.
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
#: More spans than this are told in whole MiB: the state is written every other second.
_MAX_SPANS = 50_000


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be the same for a download to go on: ``kind`` is the format and way."""

    size: int
    digest: str
    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Saved:
    """What an earlier run said: of which image, what is done, what half an image lacks."""

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
        """Return what an earlier run said, or None: nothing, or nothing that can be read."""
        try:
            with open(self.path, "rb") as file:
                return parse(file.read())
        except OSError:
            return None

    def save(self, image: Identity, done: Sequence[Range], undone: Spans | None = None) -> None:
        """Say that these ranges are on stable storage, and that ``undone`` is still to be."""
        temporary = f"{self.path}.new"
        with local_errors(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)  # rather than following a link
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

    def remove(self) -> None:
        """Forget."""
        with local_errors(self.path), contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def require_whole(state: State, file: str, changed: Spans) -> None:
    """Refuse to change ``file`` if it is half old, half new and would stay so.

    Raises:
        LocalFailure: what an earlier run has left undone is not among what is ``changed``.
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
    """Write a state."""
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
    """Read a state; None if it is damaged, or of another version."""
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
