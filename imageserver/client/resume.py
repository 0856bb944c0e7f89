# SPDX-License-Identifier: Apache-2.0
"""What is left of an interrupted download: a small JSON file beside what was written so far.

A range counts as done only when its bytes were synced *before* this file says so, and this file
is replaced as a whole: after SIGKILL or loss of power it says less than was done, never more.
It fits an image of the same size and extents only, whatever its URL; of an image that was
changed in between without that, nothing here can tell.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from imageserver.client.localfile import local_errors
from imageserver.client.plan import Range, Spans

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """What must be the same for a download to go on: ``kind`` is the format and way."""

    size: int
    digest: str
    kind: str


def identity(size: int, kind: str, *spans: Spans) -> Identity:
    """Return the identity of an image with these extents."""
    digest = hashlib.sha256()
    for which in spans:
        digest.update(len(which).to_bytes(8, "big"))
        digest.update(which.raw())
    return Identity(size, digest.hexdigest(), kind)


class State:
    """The file at ``path``."""

    def __init__(self, path: str) -> None:
        self._path = path

    def exists(self) -> bool:
        """Tell whether an earlier download left one."""
        return os.path.exists(self._path)

    def load(self, wanted: Identity) -> list[Range] | None:
        """Return what was done of this very image, or None: nothing, or another image's."""
        try:
            with open(self._path, "rb") as file:
                return parse(file.read(), wanted)
        except OSError:
            return None

    def save(self, image: Identity, done: Sequence[Range]) -> None:
        """Say that these ranges are on stable storage."""
        temporary = f"{self._path}.new"
        with local_errors(self._path):
            with open(temporary, "wb") as file:
                file.write(encode(image, done))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)

    def remove(self) -> None:
        """Forget."""
        with local_errors(self._path), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def encode(image: Identity, done: Sequence[Range]) -> bytes:
    """Write a state."""
    fields = {
        "imagectl": _VERSION,
        "size": image.size,
        "extents": image.digest,
        "kind": image.kind,
        "done": done,
    }
    return json.dumps(fields).encode() + b"\n"


def parse(text: bytes, wanted: Identity) -> list[Range] | None:
    """Read a state; None if it is damaged or of another image."""
    try:
        fields = json.loads(text)
        image = Identity(fields["size"], fields["extents"], fields["kind"])
        done = [(start, stop) for start, stop in fields["done"]]
    except (ValueError, KeyError, TypeError):
        return None
    if fields.get("imagectl") != _VERSION or image != wanted:
        return None
    last = 0
    for start, stop in done:
        if type(start) is not int or type(stop) is not int or not last <= start < stop:
            return None
        last = stop
    return done if last <= image.size else None
