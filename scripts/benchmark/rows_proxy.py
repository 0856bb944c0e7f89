# SPDX-License-Identifier: Apache-2.0
"""A row through haproxy, as conf/haproxy.cfg has it: what the proxy costs, whoever is behind it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import clients
from figures import Figure, Measure, Rounds
from rows_data import Side
from verify import digest, expect
from world import GIB, MIB, SHIFT, World


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two servers that do the same, and who the second one is."""

    work: str
    against: str
    ours: Side
    reference: Side
    measure: Callable[[Side, int], Measure]
    """Makes a measure of a side; the second argument is where its bodies begin in the source."""


def haproxy(world: World) -> list[Figure]:
    """GET a file and PUT an image through haproxy: speed against direct, and haproxy's CPU."""
    return [*_compare(world, _got(world)), *_compare(world, _put(world))]


def _got(world: World) -> Comparison:
    image, _ = world.readable
    size = world.scale.image
    wanted = digest(image, (0, size))

    def measure(side: Side, _shift: int) -> Measure:
        expect(clients.run([side.get(hashed=True)]).digests, [wanted], side.path)
        return lambda _: side.timed(side.get(), size)

    ours = Side(world.server.port, world.server.add_file(image))
    nginx = Side(world.nginx, f"/images/plain-{image.name}")
    return Comparison(f"GET {_size(size)} file", "nginx", ours, nginx, measure)


def _put(world: World) -> Comparison:
    image, socks = world.writable
    size, source = world.scale.image, world.source

    def measure(side: Side, shift: int) -> Measure:
        wanted = digest(source, (shift, size))

        def seconds(_number: int) -> float:
            taken = side.timed(side.put(source, shift, size))
            expect(digest(image, (0, size)), wanted, side.path)
            return taken

        return seconds

    ours = Side(world.server.port, world.server.add_nbd(socks["ours"]))
    reference = Side(world.reference.port, f"/images/{socks['reference'].name}")
    return Comparison(f"PUT {_size(size)} over NBD", "the reference", ours, reference, measure)


def _compare(world: World, two: Comparison) -> list[Figure]:
    hosts = {"kvm1": two.ours.port, "kvm2": two.reference.port}
    routes = {two.ours.path: "kvm1", two.reference.path: "kvm2"}
    with world.haproxy(routes, **hosts) as proxy:
        ours = replace(two.ours, port=proxy.port, server=proxy, cpu=[])
        reference = replace(two.reference, port=proxy.port, server=proxy, cpu=[])
        # Bodies in turn from two places: no two successive PUTs write the same.
        rounds = Rounds.take(
            world.scale.rounds,
            ours=two.measure(ours, 0),
            ours_direct=two.measure(two.ours, SHIFT),
            reference=two.measure(reference, 0),
            reference_direct=two.measure(two.reference, SHIFT),
        )
    size = world.scale.image
    return [
        _slowed(f"{two.work} through haproxy", "ours", rounds, size),
        _slowed(f"{two.work} through haproxy, {two.against}", "reference", rounds, size),
        _cost(f"haproxy's CPU of {two.work}", two.against, ours, reference, size),
    ]


def _slowed(work: str, who: str, rounds: Rounds, size: int) -> Figure:
    def speed(name: str) -> str:
        return f"{size / MIB / rounds.median(name):.0f} MiB/s"

    direct = f"{who}_direct"
    ratios = rounds.ratios(direct, who)
    return Figure(work, "direct", ratios, ours=speed(who), reference=speed(direct))


def _cost(work: str, against: str, ours: Side, reference: Side, size: int) -> Figure:
    # A tick at least: quick runs cost less.
    pairs = [(max(a, 0.01), max(b, 0.01)) for a, b in zip(ours.cpu, reference.cpu, strict=True)]
    rounds = Rounds({"ours": [a for a, _ in pairs], "reference": [b for _, b in pairs]})

    def cost(name: str) -> str:
        return f"{rounds.median(name) * GIB / size:.2f} s/GiB"

    ratios = rounds.ratios("ours", "reference")
    return Figure(work, f"before {against}", ratios, ours=cost("ours"), reference=cost("reference"))


def _size(size: int) -> str:
    return f"{size // GIB} GiB" if size >= GIB else f"{size // MIB} MiB"
