# SPDX-License-Identifier: Apache-2.0
"""Faults behind and below an NBD image: the Nth NBD request fails, or the Nth call of libnbd.

After each: an answer that is complete is right, what a write has not said to be done may be
there or not, and nothing else has changed; nothing is held, and the next request succeeds.
"""

import errno
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.faults import Faults
from lab.servers import nbdkit, qemu_nbd

from proving.operations import mixes, sums
from proving.qcow2_streams import Qcow2Streams
from proving.sweep import Fault, NotPrepared, Operation, sweep
from proving.world import Answer, World

SIZE = 1 << 20
#: What an NBD server may answer (NBD protocol, "Error values").
ERRORS = (errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EINVAL)
_PLUGIN = Path(__file__).with_name("nth.py")
_MOST_EXTENTS = 64 << 10
_OLD = b"".join(bytes([n]) * _MOST_EXTENTS if n % 3 else bytes(_MOST_EXTENTS) for n in range(16))
_NEW = _OLD[::-1]
_SPAN = slice(100_000, 400_000)
_ZEROED = _OLD[: _SPAN.start] + bytes(300_000) + _OLD[_SPAN.stop :]
_PATCHED = _OLD[: _SPAN.start] + _NEW[_SPAN] + _OLD[_SPAN.stop :]
_OK = 200


class NthRequest:
    """Lets the Nth request of an nbdkit with our plugin fail."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._tokens = map(str, itertools.count())
        self._token = ""
        self.arm(0, 0)

    def arm(self, nth: int, error: int) -> None:
        """Let the ``nth`` request from now on fail with this error."""
        self._token = next(self._tokens)
        new = self._control.with_suffix(".new")
        new.write_text(f"{nth} {error} {self._token}")
        new.rename(self._control)

    def disarm(self) -> str:
        """Let none fail; return "request" if one has."""
        failed = self._control.with_name(self._control.name + ".failed")
        is_failed = failed.exists() and failed.read_text() == self._token
        self.arm(0, 0)
        return "request" if is_failed else ""


def _old(world: World) -> None:
    if _content(world) == _OLD:
        return
    answer = world.ask("PUT", "/images/disk", _OLD)
    if answer.status != _OK:
        raise NotPrepared(f"{answer.status} {answer.body!r}")


def _content(world: World) -> bytes:
    return world.ask("GET", "/images/disk").body


def _reads(_world: World, answer: Answer) -> Iterator[str]:
    if answer.status == _OK and not (
        _OLD.startswith(answer.body) if answer.cut else answer.body == _OLD
    ):
        yield f"200 with {len(answer.body)} wrong bytes"


def _writes(wanted: bytes) -> Callable[[World, Answer], Iterator[str]]:
    def check(world: World, answer: Answer) -> Iterator[str]:
        now = _content(world)
        if answer.status == _OK and now != wanted:
            yield "200, and not all of it was written"
        if not mixes(now, _OLD, wanted):
            yield f"{answer.status}, and there is what nobody has written"

    return check


def _maps(_world: World, answer: Answer) -> Iterator[str]:
    if answer.status != _OK or answer.cut:
        return
    at = 0
    for extent in answer.json or []:
        span = _OLD[at : at + extent["length"]]
        if extent["start"] != at or (extent["zero"] and any(span)):
            yield f"a wrong extent: {extent}"
        at += extent["length"]
    if at != SIZE:
        yield f"extents end at {at}"


def _patch(fields: dict[str, object]) -> Callable[[World], Answer]:
    text = json.dumps(fields).encode()
    headers = {"Content-Type": "application/json"}
    return lambda world: world.ask("PATCH", "/images/disk", text, headers)


_ZERO = {"op": "zero", "offset": _SPAN.start, "size": 300_000, "flush": True}
_RANGE = {"Range": f"bytes={_SPAN.start}-{_SPAN.stop - 1}"}
_SHA256 = "/images/disk/checksum?algorithm=whole-sha256"
OPERATIONS = (
    Operation("GET", lambda w: w.ask("GET", "/images/disk"), _reads, _old),
    Operation("PUT", lambda w: w.ask("PUT", "/images/disk?flush=y", _NEW), _writes(_NEW), _old),
    Operation(
        "PATCH",
        lambda w: w.ask("PATCH", "/images/disk", _NEW[_SPAN], _RANGE),
        _writes(_PATCHED),
        _old,
    ),
    Operation("zero", _patch(_ZERO), _writes(_ZEROED), _old),
    Operation("flush", lambda w: w.ask("POST", "/images/disk/flush"), _writes(_OLD), _old),
    Operation("extents", lambda w: w.ask("GET", "/images/disk/extents"), _maps, _old),
    Operation("checksum", lambda w: w.ask("GET", _SHA256), sums(_OLD), _old),
    *Qcow2Streams("/images/disk", _OLD, prepare=_old).operations(),
)


@contextmanager
def _with_disk(socket: Path) -> Iterator[World]:
    with World(backend_timeout=2) as world:
        world.add("disk", socket=str(socket))
        yield world


def run(
    directory: Path,
    errors: Iterable[int] = ERRORS,
    names: Iterable[str] = (),
    *,
    calls: bool = True,
) -> Iterator[Fault]:
    """Sweep all operations, or those of these names: NBD requests, then ``calls`` of libnbd."""
    wanted = [operation for operation in OPERATIONS if not names or operation.name in names]
    control = directory / "control"
    requests = NthRequest(control)
    with nbdkit(directory / "nth.sock", "python", str(_PLUGIN), f"control={control}") as socket:
        for operation, error in itertools.product(wanted, errors):
            yield from sweep(operation, error, requests, lambda: _with_disk(socket))
    if not calls:
        return
    # nbdkit 1.32 dies of a client that hangs up with several requests under way ("raw_send_socket:
    # Assertion `sock >= 0' failed"); qemu-nbd does not.
    image = directory / "disk.raw"
    image.write_bytes(_OLD)
    with qemu_nbd(image) as socket:
        for operation, error in itertools.product(wanted, errors):
            yield from sweep(operation, error, Faults(), lambda: _with_disk(socket))
