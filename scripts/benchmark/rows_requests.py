# SPDX-License-Identifier: Apache-2.0
"""Rows of small requests and of streams against oVirt's daemon: what its clients would notice."""

from collections.abc import Iterator
from statistics import median
from urllib.parse import urlsplit

from benchmark.cases import Case, Place
from benchmark.figures import KIB, MIB, Figure, Rounds
from benchmark.world import SHIFT, World

#: Each with the least ratio of requests per second.
CASES = [
    *(Case("GET", size * KIB, 1, 1.1) for size in (4, 64, 256)),
    *(Case("GET", size * KIB, 4, 1.4) for size in (4, 64, 256)),
    *(Case("GET", size * MIB, count, 1.3) for size in (1, 4) for count in (1, 4)),
    *(Case("PUT", size, 1, 1.1) for size in (64 * KIB, MIB)),
    *(Case("PUT", size, 4, 1.3) for size in (64 * KIB, MIB)),
    Case("zero", 64 * KIB, 1, 1.1),
    Case("flush", 0, 1, 1.1),
    Case("OPTIONS", 0, 4, 1.6),
    *(Case(method, 512 * MIB, 1, 1.6) for method in ("GET", "PUT")),
]

#: Of raw files, each with the least ratio to the same server over NBD.
RAW_CASES = [
    *(Case("GET", 64 * KIB, count, 1.5) for count in (1, 4)),
    *(Case("PUT", 64 * KIB, count, 1.0) for count in (1, 4)),
    *(Case(method, 512 * MIB, 1, 1.0) for method in ("GET", "PUT")),
]


def get(world: World) -> list[Figure]:
    """GET of ranges, and of much."""
    return list(_compare(world, "GET"))


def put(world: World) -> list[Figure]:
    """PUT with Content-Range, the same."""
    return list(_compare(world, "PUT"))


def other(world: World) -> list[Figure]:
    """PATCH and OPTIONS."""
    return list(_compare(world, "zero", "flush", "OPTIONS"))


def raw(world: World) -> list[Figure]:
    """GET and PUT of a raw file, against an NBD server's export of it."""
    return list(_compare_raw(world))


def _compare_raw(world: World) -> Iterator[Figure]:
    server = world.parallel
    for case in RAW_CASES:
        if case.size > world.scale.image:
            continue
        image, socks = world.readable if case.kind == "GET" else world.writable
        paths = {"raw": server.add_raw(image), "nbd": server.add_nbd(socks["ours"])}
        sides = {
            name: Place(
                server.port, path, image, world.source, SHIFT * (name == "nbd"), server.pids
            )
            for name, path in paths.items()
        }
        yield _figure(world, case, sides, f"raw file: {case}", "the same over NBD")


def _compare(world: World, *kinds: str) -> Iterator[Figure]:
    for case in CASES:
        if case.kind not in kinds or case.size > world.scale.image:
            continue
        image, socks = world.readable if case.kind == "GET" else world.writable
        size = image.stat().st_size
        theirs = urlsplit(world.ovirt.add_nbd(socks["ovirt"], size)).path
        server, daemon = world.parallel, world.ovirt
        path = server.add_nbd(socks["ours"])
        sides = {
            "ours": Place(server.port, path, image, world.source, 0, server.worker_pids()),
            "ovirt": Place(daemon.port, theirs, image, world.source, SHIFT, [daemon.pid]),
        }
        yield _figure(world, case, sides, f"{case}", "oVirt's daemon")


def _figure(world: World, case: Case, sides: dict[str, Place], what: str, other: str) -> Figure:
    """Measure two sides; the first one is ours."""
    seconds = world.scale.seconds
    rounds = Rounds.take(
        world.scale.rounds if case.is_stream else world.scale.turns,
        **{name: case.measure(world.clients, side, seconds) for name, side in sides.items()},
    )
    figure = Figure(what, other, [], case.target)
    cpu = [f"{median(side.cpu) * 1e6:.0f} µs" for side in sides.values()]
    figure.note = "CPU of a request: ours {}, theirs {}".format(*cpu)
    return rounds.compare(figure, case.rate, *sides)
