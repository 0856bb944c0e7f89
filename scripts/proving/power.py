# SPDX-License-Identifier: Apache-2.0
"""The power fails at any moment, and what was not synced is lost, in any part.

A file is the old one or the new one at each moment, and the new one once a request was answered;
so is a registration.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.faults import Faults
from lab.powercut import Disk, cuts, say

from imageserver.core.transfer import id_hash
from proving.calls import register, unregister
from proving.world import Answer, World

_OLD = b"old" * 60_000
_NEW = bytes(65_536) + b"new" * 60_000
_OK = 200


@dataclass(frozen=True)
class Case:
    """What is done between two states of the file at ``path`` in the server's directory."""

    name: str
    path: str
    run: Callable[[World], Answer]
    prepare: Callable[[World], object]


def _image(content: bytes | None) -> Callable[[World], None]:
    def prepare(world: World) -> None:
        path = world.images / "image"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)

    return prepare


def _linked(world: World) -> None:
    """Let the transfer name a link to the image."""
    _image(_OLD)(world)
    (world.top / "link").symlink_to(world.images / "image")
    world.add("image", backend="file", file=str(world.top / "link"))


def _put(path: str) -> Callable[[World], Answer]:
    return lambda world: world.ask("PUT", path, _NEW)


_REGISTRATION = f"run/registered/{id_hash('r')}"
CASES = (
    Case("PUT", "images/image", _put("/images/image"), _image(_OLD)),
    Case("PUT with flush=y", "images/image", _put("/images/image?flush=y"), _image(_OLD)),
    Case("PUT of a new file", "images/image", _put("/images/image?flush=y"), _image(None)),
    Case("PUT through a link", "images/image", _put("/images/image"), _linked),
    Case("register", _REGISTRATION, register("new"), lambda _world: None),
    Case("register anew", _REGISTRATION, register("new"), register("old")),
    Case("unregister", _REGISTRATION, unregister, register("old")),
)


def run(seed: int = 1, names: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Yield each cut, as its case and moment, and what was wrong."""
    faults = Faults()
    for case in CASES:
        if names and case.name not in names:
            continue
        with World() as world, tempfile.TemporaryDirectory(prefix="is-proof-") as place:
            world.add("image", backend="file", file=str(world.images / "image"))
            case.prepare(world)
            record, path = Path(place) / "record", world.top / case.path
            before = Disk.of(world.images, world.runtime / "registered", world.runtime / "activity")
            with faults.recording(record) as fd:
                answer = case.run(world)
                say(fd, "answer")
            if answer.status != _OK:
                yield f"{case.name}: answer", [f"{answer.status} {answer.body!r}"]
            old, new = before.read(path), path.read_bytes() if path.exists() else None
            if old == new:
                yield f"{case.name}: end", ["nothing has changed"]
            for said, moment, disk in cuts(before, record, seed):
                allowed = [new] if said else [old, new]
                found = disk.read(path)
                wrong = [] if found in allowed else [f"{_shown(found)} is there"]
                yield f"{case.name}: cut after {moment}", wrong


def _shown(content: bytes | None) -> str:
    return "nothing" if content is None else f"{len(content)} bytes, {content[:20]!r}...,"
