# SPDX-License-Identifier: Apache-2.0
"""Rows of checksums, against oVirt's daemon and of holes, and of what a digest costs an upload."""

import base64
import hashlib
import json
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

from lab.model import WrongBytes

from benchmark.client import Job, head
from benchmark.figures import MIB, Figure, Measure, Rounds, shown
from benchmark.rows_data import Side, checked
from benchmark.rows_imagectl import spread
from benchmark.verify import digest
from benchmark.world import SHIFT, World

#: Data of the large sparse image, as a part of an image's bytes.
_PART = 5


def checksum(world: World) -> list[Figure]:
    """Compute a checksum on the server; of data against oVirt's daemon, and of much hole."""
    size = 2 * world.scale.image
    image = world.data("sum.raw", size)
    with world.served(image, ("ours", "ovirt"), "--read-only") as socks:
        figure = _dense(world, image, socks)
    image.unlink()
    return [figure, _sparse(world)]


def _dense(world: World, image: Path, socks: dict[str, Path]) -> Figure:
    size = image.stat().st_size
    ours = _origin(world) + world.server.add_nbd(socks["ours"])
    theirs = world.ovirt.add_nbd(socks["ovirt"], size)
    if (told := _told(ours)) != _told(theirs):
        raise WrongBytes(f"{told} is not the checksum that oVirt's daemon computes of {image}")
    rounds = Rounds.take(world.scale.rounds, ours=_asks(ours), ovirt=_asks(theirs))
    return rounds.speed(f"checksum of {shown(size)} over NBD", "ovirt", size, 1.5)


def _sparse(world: World) -> Figure:
    size = 2 * world.scale.image // _PART // MIB * MIB
    image = spread(world, world.scale.sparse, size)
    with world.served(image, ("ours",), "--read-only") as socks:
        url = _origin(world) + world.server.add_nbd(socks["ours"])
        rounds = Rounds.take(world.scale.rounds, ours=_asks(url))
    work = f"checksum of {shown(world.scale.sparse)} with {shown(size)} of data"
    seconds = rounds.values["ours"]
    return Figure(work, "wall clock", seconds, 1.0, at_least=False, unit="s")


def digests(world: World) -> list[Figure]:
    """PUT a whole image over NBD with a digest that the server verifies, and without."""
    image, socks = world.writable
    size, source = world.scale.image, world.source
    server = world.server
    side = Side(world.clients, server.port, server.add_nbd(socks["ours"]), server.pids)

    def writes(offset: int, *, has_digest: bool) -> Measure:
        job = side.put(source, offset, size)
        if has_digest:
            job = _with_digest(job, side.path, source)
        wanted = digest(source, (offset, size))
        return checked(lambda: side.run(job).seconds, image, wanted)

    rounds = Rounds.take(
        world.scale.rounds,
        ours=writes(0, has_digest=True),
        plain=writes(SHIFT, has_digest=False),
    )
    work = f"PUT {shown(size)} over NBD with a digest"
    return [rounds.speed(work, "plain", size, 0.8)]


def _with_digest(job: Job, path: str, source: Path) -> Job:
    made = hashlib.sha256()
    with source.open("rb") as file:
        file.seek(job.offset)
        for _ in range(job.length // MIB):
            made.update(file.read(MIB))
    field = f"sha-256=:{base64.b64encode(made.digest()).decode()}:"
    request = head("PUT", path, Content_Length=job.length, Content_Digest=field)
    return replace(job, requests=[request])


def _origin(world: World) -> str:
    return f"http://127.0.0.1:{world.server.port}"


def _told(url: str) -> dict[str, object]:
    with urllib.request.urlopen(f"{url}/checksum") as answer:  # noqa: S310 - loopback
        found: dict[str, object] = json.load(answer)
    return found


def _asks(url: str) -> Measure:
    wanted = _told(url)

    def measure(_number: int) -> float:
        began = time.monotonic()
        found = _told(url)
        seconds = time.monotonic() - began
        if found != wanted:
            raise WrongBytes(f"{found} is another checksum of {url} than {wanted}")
        return seconds

    return measure
