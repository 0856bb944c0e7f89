# SPDX-License-Identifier: Apache-2.0
"""What is done to files, registrations, the slot table, locks and counts; what is right afterwards.

An image is the old one or the new one, and the new one where the answer says so.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator

from imageserver.backends.table import KINDS
from imageserver.core.control_protocol import parse_command
from imageserver.core.errors import ImageServerError
from imageserver.core.ports import Ticket
from imageserver.core.slots import Kind
from imageserver.observability.metrics.numbers import read_all
from imageserver.observability.metrics.stored import Store
from imageserver.runtime.slottable import SharedTable
from proving.sweep import Operation
from proving.world import Answer, World

_OLD = b"old" * 30_000
_NEW = bytes(65_536) + b"new" * 30_000
#: Some counter.
_PLACE = 7
#: A raw file: data, a hole, data; and a part of it.
_RAW_OLD = b"old!" * 16_384 + bytes(65_536) + b"raw." * 16_384
_RAW_NEW = b"new?" * (len(_RAW_OLD) // 4)
_SPAN, _SIZE = slice(50_000, 150_000), 100_000
_ZERO: dict[str, object] = {"op": "zero", "offset": _SPAN.start, "size": _SIZE, "flush": True}
_RANGE = {"Range": f"bytes={_SPAN.start}-{_SPAN.stop - 1}"}
_JSON = {"Content-Type": "application/json"}
_SHA256 = "/images/raw/checksum?algorithm=whole-sha256"
_BLOCK = 4096
_OK = 200
_DONE = {_OK, 206}


def _old(world: World) -> None:
    (world.images / "image").write_bytes(_OLD)


def _none(world: World) -> None:
    (world.images / "image").unlink(missing_ok=True)


def _content(world: World) -> bytes | None:
    try:
        return (world.images / "image").read_bytes()
    except FileNotFoundError:
        return None


def _replaced(before: bytes | None) -> Callable[[World, Answer], Iterator[str]]:
    def check(world: World, answer: Answer) -> Iterator[str]:
        is_new = _content(world) == _NEW
        if answer.status == _OK and not is_new:
            yield "200, and the image is not the new one"
        if answer.status != _OK and _content(world) != before:
            yield f"{answer.status}, and the image is not the old one"
        if answer.status == _OK and answer.json.get("bytes_written") != len(_NEW):
            yield f"200, and {answer.body!r}"

    return check


def reads(expected: bytes) -> Callable[[World, Answer], Iterator[str]]:
    """Return what checks that an answer has these bytes, or their beginning where it is cut."""

    def check(_world: World, answer: Answer) -> Iterator[str]:
        if answer.status not in _DONE:
            return
        if answer.cut:
            if not expected.startswith(answer.body):
                yield "wrong bytes before the cut"
        elif answer.body != expected:
            yield f"{answer.status} with {len(answer.body)} wrong bytes"

    return check


def _raw_old(world: World) -> None:
    (world.images / "raw").write_bytes(_RAW_OLD)


def _raw_writes(wanted: bytes) -> Callable[[World, Answer], Iterator[str]]:
    """A raw file is written in place: where that fails, each byte is the old or the new one."""

    def check(world: World, answer: Answer) -> Iterator[str]:
        now = (world.images / "raw").read_bytes()
        if answer.status == _OK and now != wanted:
            yield "200, and not all of it was written"
        if not mixes(now, _RAW_OLD, wanted):
            yield f"{answer.status}, and there is what nobody has written"

    return check


def mixes(now: bytes, *either: bytes) -> bool:
    """Tell whether each byte is one of those that either of these has in its place."""
    if not len(now) == len(either[0]) == len(either[1]):
        return False
    for at in range(0, len(now), _BLOCK):
        found, *known = (data[at : at + _BLOCK] for data in (now, *either))
        if found not in known and any(
            byte not in pair for byte, *pair in zip(found, *known, strict=True)
        ):
            return False
    return True


def _raw_maps(_world: World, answer: Answer) -> Iterator[str]:
    if answer.status != _OK or answer.cut:
        return
    at = 0
    for extent in answer.json or []:
        if extent["start"] != at or (extent["zero"] and any(_RAW_OLD[at : at + extent["length"]])):
            yield f"a wrong extent: {extent}"
        at += extent["length"]
    if at != len(_RAW_OLD):
        yield f"extents end at {at}"


def sums(expected: bytes) -> Callable[[World, Answer], Iterator[str]]:
    """Return what checks that an answer, if it is whole, has these bytes' SHA-256."""
    wanted = hashlib.sha256(expected).hexdigest()

    def check(_world: World, answer: Answer) -> Iterator[str]:
        if answer.status == _OK and not answer.cut and answer.json["checksum"] != wanted:
            yield f"a wrong checksum: {answer.body!r}"

    return check


def _patch_raw(fields: dict[str, object]) -> Callable[[World], Answer]:
    """Return what sends a JSON PATCH to the raw file."""
    text = json.dumps(fields).encode()
    return lambda world: world.ask("PATCH", "/images/raw", text, _JSON)


def _any(_world: World, _answer: Answer) -> Iterator[str]:
    yield from ()


def _put(world: World) -> Answer:
    return world.ask("PUT", "/images/image?flush=y", _NEW)


def _control(text: str) -> Callable[[World], Answer]:
    """Return what a control program asks for; as the control socket answers it."""

    def run(world: World) -> Answer:
        try:
            said = world.process.administration.run(
                parse_command(text.encode(), KINDS), lambda: True
            )
        except ImageServerError as exc:
            return Answer(500, body=str(exc).encode())
        return Answer(_OK, body=said)

    return run


def register(name: str) -> Callable[[World], Answer]:
    """Return what registers a transfer ``r``, an image of this name."""
    config = {"backend": "file", "file": f"/images/{name}"}
    command = {"action": "register", "transfer_id": "r", "config": config}
    return _control(json.dumps(command))


unregister = _control('{"action":"unregister","transfer_id":"r"}')


def _registered(world: World) -> str:
    """Return what file a new worker finds that the registration names."""
    found = [it for it in world.process.registrations.all() if it.id == "r"]
    return os.path.basename(found[0].image.path) if found else ""  # type: ignore[attr-defined]


def _is_registered(*others: str) -> Callable[[World, Answer], Iterator[str]]:
    def check(world: World, answer: Answer) -> Iterator[str]:
        now = _registered(world)
        if answer.status == _OK and now != "new":
            yield f"registered, and it is {now or 'unknown'}"
        elif now not in {"new", *others}:
            yield f"refused, and it is {now or 'unknown'}"

    return check


def _is_unregistered(world: World, answer: Answer) -> Iterator[str]:
    if answer.status == _OK and _registered(world):
        yield "unregistered, and still known"


def _claim(world: World) -> Answer:
    ticket = Ticket("t", "read", "", "")
    try:
        world.process.slots.claim(Kind.READ, ticket).release()
    except ImageServerError as exc:
        return Answer(503, body=str(exc).encode())
    return Answer(_OK)


def _map(world: World) -> Answer:
    """Open the table as a new worker does, claim, and let go."""
    table = SharedTable(world.process.runtime, {Kind.READ: 1})
    try:
        table.claim(Kind.READ, Ticket("t", "read", "", "")).release()
        table.sweep()
    except (ImageServerError, OSError) as exc:
        return Answer(503, body=str(exc).encode())
    finally:
        if table._mapping is not None:  # noqa: SLF001 - without the runtime directory, which is lent
            table.close()
    return Answer(_OK)


def _prune(world: World) -> Answer:
    """Look after lock files as a start does, which may fail."""
    try:
        world.process.locks.prune()
    except OSError as exc:
        return Answer(500, body=str(exc).encode())
    return Answer(_OK)


def _count(world: World) -> Answer:
    """Count in a file that another process has left, which has counted one."""
    place = world.runtime / "metrics"
    store = Store(str(place))
    for _ in range(3):  # what fails at first is done when it can be
        store.add((_PLACE, 1.0))
        store.flush()
    store.close()
    return Answer(_OK)


def _counted(world: World) -> float:
    found, _ = read_all(str(world.runtime / "metrics"))
    return sum(counts[_PLACE] for counts in found)


def _leave_one(world: World) -> None:
    place = world.runtime / "metrics"
    for path in place.iterdir():
        path.unlink()
    store = Store(str(place))
    store.add((_PLACE, 1.0))
    store.close()


def _has_counted(world: World, _answer: Answer) -> Iterator[str]:
    # What the other has left may be given up, as damaged, but not what is counted now.
    if (counted := _counted(world)) not in {3, 4}:
        yield f"counted {counted} of 4"


OPERATIONS = (
    Operation("PUT", _put, _replaced(_OLD), _old),
    Operation("PUT of a new file", _put, _replaced(None), _none),
    Operation("GET", lambda w: w.ask("GET", "/images/image"), reads(_OLD), _old),
    Operation("HEAD", lambda w: w.ask("HEAD", "/images/image"), _any, _old),
    Operation("OPTIONS", lambda w: w.ask("OPTIONS", "/images/image"), _any, _old),
    Operation("flush", lambda w: w.ask("POST", "/images/image/flush"), _any, _old),
    Operation(
        "register",
        register("new"),
        _is_registered(""),
        afterwards=unregister,
    ),
    Operation(
        "register anew",
        register("new"),
        _is_registered("old"),
        register("old"),
        unregister,
    ),
    Operation("unregister", unregister, _is_unregistered, register("old"), unregister),
    Operation("list", _control('{"action":"list"}'), _any, register("old"), unregister),
    Operation(
        "raw PUT",
        lambda w: w.ask("PUT", "/images/raw?flush=y", _RAW_NEW),
        _raw_writes(_RAW_NEW),
        _raw_old,
    ),
    Operation(
        "raw PATCH",
        lambda w: w.ask("PATCH", "/images/raw", _RAW_NEW[_SPAN], _RANGE),
        _raw_writes(_RAW_OLD[: _SPAN.start] + _RAW_NEW[_SPAN] + _RAW_OLD[_SPAN.stop :]),
        _raw_old,
    ),
    Operation(
        "raw zero",
        _patch_raw(_ZERO),
        _raw_writes(_RAW_OLD[: _SPAN.start] + bytes(_SIZE) + _RAW_OLD[_SPAN.stop :]),
        _raw_old,
    ),
    Operation(
        "raw flush", lambda w: w.ask("POST", "/images/raw/flush"), _raw_writes(_RAW_OLD), _raw_old
    ),
    Operation("raw extents", lambda w: w.ask("GET", "/images/raw/extents"), _raw_maps, _raw_old),
    Operation("raw checksum", lambda w: w.ask("GET", _SHA256), sums(_RAW_OLD), _raw_old),
    Operation("slot", _claim, _any),
    Operation("slot table", _map, _any),
    Operation("locks pruned", _prune, _any),
    Operation("metrics", _count, _has_counted, _leave_one),
)
