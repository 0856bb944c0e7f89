# SPDX-License-Identifier: Apache-2.0
"""The power fails at any moment, and what was not synced is lost, in any part.

A file is the old one or the new one at each moment, and the new one once a request was answered;
so is a registration.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.faults import Faults
from lab.powercut import Disk, cuts, say

from imageserver.core.transfer import id_hash
from proving.operations import mixes, register, unregister
from proving.world import Answer, World

_OLD = b"old" * 60_000
_NEW = bytes(65_536) + b"new" * 60_000
_ZERO: dict[str, object] = {"op": "zero", "offset": 10_000, "size": 100_000, "flush": True}
_OK = 200


@dataclass(frozen=True)
class Case:
    """What is done between two states of the file at ``path`` in the server's directory."""

    name: str
    path: str
    run: Callable[[World], Answer]
    prepare: Callable[[World], object]
    in_place: bool = False
    """Until it is answered, each byte may be the old or the new one."""


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


def _raw(world: World) -> None:
    (world.images / "raw").write_bytes(_OLD)
    world.add("raw", backend="file", file=str(world.images / "raw"), format="raw")


def _put_raw(world: World) -> Answer:
    return world.ask("PUT", "/images/raw?flush=y", _NEW[: len(_OLD)])


def _patch(fields: dict[str, object]) -> Callable[[World], Answer]:
    text = json.dumps(fields).encode()
    headers = {"Content-Type": "application/json"}
    return lambda world: world.ask("PATCH", "/images/raw", text, headers)


def _patch_and_flush(world: World) -> Answer:
    """Write two ranges, by two requests, and have both synced by a third."""
    for start in (50_000, 120_000):
        span = {"Range": f"bytes={start}-{start + 9_999}"}
        answer = world.ask("PATCH", "/images/raw", _NEW[-10_000:], span)
        if answer.status != _OK:
            return answer
    return world.ask("POST", "/images/raw/flush")


_REGISTRATION = f"run/registered/{id_hash('r')}"
CASES = (
    Case("PUT", "images/image", _put("/images/image"), _image(_OLD)),
    Case("PUT with flush=y", "images/image", _put("/images/image?flush=y"), _image(_OLD)),
    Case("PUT of a new file", "images/image", _put("/images/image?flush=y"), _image(None)),
    Case("PUT through a link", "images/image", _put("/images/image"), _linked),
    Case("raw PUT", "images/raw", _put_raw, _raw, in_place=True),
    Case("raw PATCH and flush", "images/raw", _patch_and_flush, _raw, in_place=True),
    Case("raw zero with flush", "images/raw", _patch(_ZERO), _raw, in_place=True),
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
                found = disk.read(path)
                is_right = found in ([new] if said else [old, new])
                if case.in_place and not said and found and old and new:
                    is_right = mixes(found, old, new)
                wrong = [] if is_right else [f"{_shown(found)} is there"]
                yield f"{case.name}: cut after {moment}", wrong


def _shown(content: bytes | None) -> str:
    return "nothing" if content is None else f"{len(content)} bytes, {content[:20]!r}...,"
