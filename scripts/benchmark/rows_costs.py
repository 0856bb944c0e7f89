# SPDX-License-Identifier: Apache-2.0
"""Rows about everything but bulk data and requests: maps, zeroing, memory, spread."""

import contextlib
import os
from statistics import median

from benchmark.client import Job, head
from benchmark.figures import GIB, MIB, Figure, Rounds
from benchmark.readers import Readers
from benchmark.verify import answer_digest, expect, map_digest, nbdinfo
from benchmark.watching import MemorySampler, resident, timed
from benchmark.world import World

#: Of what takes many seconds.
_SLOW_ROUNDS = 2
_READERS = 8
_WORKERS = 4
_RUN = 128 * 1024
"""Mean length of a run of data, and of a hole, in the image with many extents."""


def extents(world: World) -> list[Figure]:
    """Map an image of millions of extents, against ``nbdinfo --map``."""
    server, size = world.server, world.scale.mapped
    plugin = ["sparse-random", f"size={size}", f"runlength={_RUN}", "percent=50", "seed=1"]
    with world.nbdkit("mapped", *plugin) as sock:
        path = server.add_nbd(sock) + "/extents"
        first: list[float] = []
        growth: list[float] = []
        lengths: set[int] = set()

        def ours(_number: int) -> float:
            request = head("GET", path, Connection="close")  # without chunks
            before = resident(server.worker_pids())
            with MemorySampler(server.worker_pids()) as sampler:
                outcome = world.clients.run([Job(server.port, [request])])
            growth.append((sampler.peak - before) / MIB)
            first.append(outcome.first_byte_seconds)
            lengths.add(outcome.received)
            return outcome.seconds

        rounds = Rounds.take(_SLOW_ROUNDS, ours=ours, nbdinfo=lambda _: timed(nbdinfo(sock))[0])
        expect(len(lengths), 1, "lengths of the list of extents")
        count, wanted = map_digest(sock)
        expect(answer_digest(server.port, path), (count, wanted), "extents")
    work = f"extents of {size // GIB} GiB"
    note = f"{count} extents, equal in both"
    return [
        rounds.less(
            Figure(work, "nbdinfo --map", [], 1.5, note=note), lambda s: f"{s:.2f} s", "nbdinfo"
        ),
        Figure(work, "workers' memory growth", growth, 64, at_least=False, unit="MiB", worst=True),
        Figure(work, "first byte", first, 0.5, at_least=False, unit="s"),
    ]


def zero(world: World) -> list[Figure]:
    """Zero a huge image that is nearly all hole, in one request."""
    size = world.scale.zeroed
    image = world.sparse("zeroed.raw", size)
    places = [0, size // 2, size - MIB]
    body = f'{{"op":"zero","offset":0,"size":{size}}}'
    with world.serving(image, "--discard=unmap") as sock:
        path = world.server.add_nbd(sock)
        fields = {"Content_Type": "application/json", "Content_Length": len(body)}
        request = head("PATCH", path, **fields) + body

        def seconds(_number: int) -> float:
            with image.open("r+b") as file:
                for place in places:
                    os.pwrite(file.fileno(), os.urandom(MIB), place)
            outcome = world.clients.run([Job(world.server.port, [request])])
            with image.open("rb") as file:
                found = [os.pread(file.fileno(), MIB, place) for place in places]
            expect([data.count(0) for data in found], [MIB] * len(places), "zeros")
            return outcome.seconds

        rounds = Rounds.take(world.scale.rounds, ours=seconds)
    image.unlink()
    work = f"zero {size // GIB} GiB of a sparse image"
    return [Figure(work, "one request", rounds.values["ours"], 2, at_least=False, unit="s")]


def memory(world: World) -> list[Figure]:
    """What each of eight concurrent readers costs, for small images and for huge ones."""
    sizes = {"small": world.scale.image, "large": world.scale.sparse}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(world.image_server("memory"))
        paths = {}
        for name, size in sizes.items():
            image = world.sparse(f"{name}.raw", size)
            paths[name] = server.add_nbd(stack.enter_context(world.serving(image, "--read-only")))
        idle = resident(server.worker_pids())

        def peak(name: str) -> float:
            request = head("GET", paths[name])
            job = Job(server.port, [request], cut_off=world.scale.hold_seconds)
            with MemorySampler(server.worker_pids()) as sampler:
                world.clients.run([job] * _READERS)
            return sampler.peak

        rounds = Rounds.take(
            world.scale.rounds, small=lambda _: peak("small"), large=lambda _: peak("large")
        )
    work = f"{_READERS} GETs of {sizes['large'] // GIB} GiB at once"
    against = f"{_READERS} of {sizes['small'] / GIB:.2g} GiB, workers' memory"
    each = [(value - idle) / MIB / _READERS for value in rounds.values["large"]]
    return [
        rounds.less(
            Figure(work, against, [], 1.1), lambda b: f"{b / MIB:.0f} MiB", "small", "large"
        ),
        Figure(work, "growth per transfer", each, 8, at_least=False, unit="MiB", worst=True),
    ]


def spread(world: World) -> list[Figure]:
    """Start transfers one by one, and see which workers get them."""
    image = world.sparse("spread.raw", world.scale.sparse)
    alone: list[list[int]] = []
    loaded: list[list[int]] = []
    with (
        world.serving(image, "--read-only") as sock,
        world.image_server("spread", workers=_WORKERS, max_readers=32) as server,
    ):
        path = server.add_nbd(sock)
        for _ in range(world.scale.rounds):
            for held, found in ((0, alone), (3, loaded)):
                with Readers(server, path) as readers:
                    busy = readers.hold(workers=2, each=held) if held else []
                    found.append(readers.add(_READERS, busy))
    work = f"{_READERS} transfers, 100 ms apart, {_WORKERS} workers"
    return [
        _spread_figure(work, "most on one worker", alone, 3),
        _spread_figure(f"{work}, two of them with 3 already", "most on one worker", loaded, 4),
    ]


def _spread_figure(work: str, against: str, found: list[list[int]], target: int) -> Figure:
    most = [float(max(counts)) for counts in found]
    shown = ", ".join("+".join(map(str, counts)) for counts in found)
    figure = Figure(work, against, most, target, at_least=False, unit="transfers", worst=True)
    figure.ours = f"{median(most):g}"
    figure.note = f"per worker, round by round: {shown}"
    return figure
