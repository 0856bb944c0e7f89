# SPDX-License-Identifier: Apache-2.0
"""A row through haproxy, as conf/haproxy.cfg has it: what the proxy costs, whoever is behind it."""

from collections.abc import Callable
from dataclasses import replace

from benchmark.figures import Figure, Measure, Rounds, shown
from benchmark.rows_data import Side, cpu
from benchmark.world import SHIFT, World


def haproxy(world: World) -> list[Figure]:
    """GET a file and PUT an image through haproxy: speed against direct, and haproxy's CPU."""
    size = shown(world.scale.image)
    image, _ = world.readable
    ours = Side(world.clients, world.server.port, world.server.add_file(image))
    nginx = Side(world.clients, world.nginx, f"/images/plain-{image.name}")
    figures = _compare(
        world, f"GET {size} file", "nginx", (ours, nginx), lambda side, _: side.reads(image)
    )
    target, socks = world.writable
    ours = Side(world.clients, world.server.port, world.server.add_nbd(socks["ours"]))
    reference = Side(world.clients, world.reference.port, f"/images/{socks['reference'].name}")

    def put(side: Side, shift: int) -> Measure:
        return side.writes(world.source, shift, target)

    work = f"PUT {size} over NBD"
    return figures + _compare(world, work, "the reference", (ours, reference), put)


def _compare(
    world: World,
    work: str,
    against: str,
    direct: tuple[Side, Side],
    measure: Callable[[Side, int], Measure],
) -> list[Figure]:
    """Compare two servers that do the same; ``measure``: of a side, with bodies from where."""
    routes = {side.path: f"kvm{number}" for number, side in enumerate(direct, 1)}
    hosts = {f"kvm{number}": side.port for number, side in enumerate(direct, 1)}
    with world.haproxy(routes, **hosts) as proxy:
        ours, reference = (
            replace(side, port=proxy.port, pids=proxy.pids, cpu=[]) for side in direct
        )
        # Bodies in turn from two places: no two successive PUTs write the same.
        rounds = Rounds.take(
            world.scale.rounds,
            ours=measure(ours, 0),
            ours_direct=measure(direct[0], SHIFT),
            reference=measure(reference, 0),
            reference_direct=measure(direct[1], SHIFT),
        )
    size, name = world.scale.image, f"{work} through haproxy"
    return [
        rounds.speed(name, "direct", size, reference="ours_direct"),
        rounds.speed(
            f"{name}, {against}", "direct", size, ours="reference", reference="reference_direct"
        ),
        cpu(f"haproxy's CPU of {work}", f"before {against}", (ours, reference), size),
    ]
