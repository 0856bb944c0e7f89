# SPDX-License-Identifier: Apache-2.0
"""Rows about files on a disk, and what of them stays in the host's page cache."""

import os
import tempfile
from pathlib import Path

from lab.processes import LabFailed

from benchmark.client import Job, head
from benchmark.clients import Outcome
from benchmark.figures import MIB, Figure, Rounds, shown
from benchmark.verify import digest, expect
from benchmark.world import ImageServer, World
from imageserver.backends.file.pagecalls import find_cached

#: On a disk, as a rule, where /tmp may be none.
_DISK = "/var/tmp"  # noqa: S108 - made private by TemporaryDirectory
#: What a stream may leave of a file.
_LEFT = 64
_NAMES = ("ours", "kept")


def disk(world: World) -> list[Figure]:
    """PUT and GET a file on a disk, against the server with ``KEEP_PAGE_CACHE=yes``."""
    size = 2 * world.scale.image
    source = world.data("disk-source", size)
    with tempfile.TemporaryDirectory(prefix="imageserver-bench-", dir=_DISK) as directory:
        image = Path(directory) / "disk.raw"
        with (
            world.image_server("dropping", keep_page_cache="no") as dropping,
            world.image_server("keeping", keep_page_cache="yes") as keeping,
        ):
            sides = dict(zip(_NAMES, (dropping, keeping), strict=True))
            figures = _measured(world, source, image, sides, size)
    source.unlink()
    return figures


def _measured(
    world: World, source: Path, image: Path, sides: dict[str, ImageServer], size: int
) -> list[Figure]:
    paths = {name: server.add_file(image) for name, server in sides.items()}
    waits: dict[str, list[float]] = {name: [] for name in sides}
    left: dict[str, list[float]] = {"PUT": [], "GET": []}

    def put(name: str) -> float:
        request = head("PUT", paths[name], Content_Length=size)
        outcome = world.clients.run(
            [Job(sides[name].port, [request], file=str(source), length=size)]
        )
        waits[name].append(outcome.waited)
        if name == "ours":
            left["PUT"].append(_cached(image))
        return outcome.seconds

    def get(name: str, *, hashed: bool = False) -> Outcome:
        job = Job(sides[name].port, [head("GET", paths[name])], size=size, digest=hashed)
        return world.clients.run([job])

    def cold(name: str) -> float:
        _forget(image)
        outcome = get(name)
        if name == "ours":
            left["GET"].append(_cached(image))
        return outcome.seconds

    count = world.scale.rounds
    puts = Rounds.take(count, ours=lambda _: put("ours"), kept=lambda _: put("kept"))
    if not _cached(image):
        raise LabFailed(f"{_DISK} is not on a disk, or the host does not tell what it caches")
    expect(get("ours", hashed=True).digests, [digest(source, (0, size))], str(image))
    colds = Rounds.take(count, ours=lambda _: cold("ours"), kept=lambda _: cold("kept"))
    get("kept")
    warms = Rounds.take(
        count, ours=lambda _: get("ours").seconds, kept=lambda _: get("kept").seconds
    )
    expect(round(_cached(image)), size // MIB, "MiB in the page cache")
    work, against = f"{shown(size)} file on a disk", "KEEP_PAGE_CACHE=yes"
    note = f"{max(waits['ours']):.2f} s after the last byte, {max(waits['kept']):.2f} kept"
    figures = [
        puts.speed(f"PUT {work}", against, size, 0.9, reference="kept"),
        colds.speed(f"GET {work}, not cached", against, size, 0.9, reference="kept"),
        warms.speed(f"GET {work}, cached", against, size, 0.9, reference="kept"),
    ]
    figures[0].note = note
    return figures + [
        Figure(f"{method} {work}", "page cache after", values, _LEFT, False, "MiB", worst=True)  # noqa: FBT003
        for method, values in left.items()
    ]


def _cached(image: Path) -> float:
    """Return how many MiB of a file are in the page cache."""
    with image.open("rb") as file:
        cached = find_cached(file.fileno(), 0, image.stat().st_size) or b""
    return cached.count(1) * os.sysconf("SC_PAGE_SIZE") / MIB


def _forget(image: Path) -> None:
    """Have the kernel drop a file from its page cache."""
    with image.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
