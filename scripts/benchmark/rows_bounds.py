# SPDX-License-Identifier: Apache-2.0
"""Rows about everything but bulk data: probes, maps, zeroing, memory, spread."""

import contextlib
import os
from statistics import median

import clients
import process
from client import Job
from figures import Figure, Rounds
from readers import Readers
from verify import answer_digest, expect, map_digest, nbdinfo
from world import GIB, MIB, Server, World

_CONNECTIONS = 4
_READERS = 8
_WORKERS = 4
_RUN = 128 * 1024
"""Mean length of a run of data, and of a hole, in the image with many extents."""


def options(world: World) -> list[Figure]:
    """OPTIONS on kept-alive connections, against a responder that answers a constant."""
    _, socks = world.writable
    path = world.server.add_nbd(socks["ours"])

    def rate(port: int) -> float:
        job = Job("loop", port, [f"OPTIONS {path} HTTP/1.1\r\nHost: bench"])
        job.seconds = world.scale.seconds
        return clients.run([job] * _CONNECTIONS).requests_per_second

    gthread = ("--worker-class", "gthread", "--threads", "64")
    with world.constant("same") as same, world.constant("gthread", *gthread) as threads:
        for server in (world.server, same, threads):
            rate(server.port)  # once, so that every worker has loaded what it loads at first use
        rounds = Rounds.take(
            world.scale.rounds,
            ours=lambda _: rate(world.server.port),
            same=lambda _: rate(same.port),
            gthread=lambda _: rate(threads.port),
        )
    work = f"OPTIONS, {_CONNECTIONS} connections"
    ours = f"{rounds.median('ours'):.0f}/s"
    return [
        Figure(
            work,
            f"a constant, {against}",
            rounds.ratios("ours", name),
            target,
            ours=ours,
            reference=f"{rounds.median(name):.0f}/s",
        )
        for name, against, target in (
            ("same", "same worker class", 0.6),
            ("gthread", "gunicorn's gthread", None),
        )
    ]


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
            head = f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close"
            before = process.resident(server.workers)
            with process.MemorySampler(server.workers) as sampler:
                outcome = clients.run([Job("transfer", server.port, [head])])
            growth.append((sampler.peak - before) / MIB)
            first.append(outcome.first_byte_seconds)
            lengths.add(outcome.received)
            return outcome.seconds

        rounds = Rounds.take(
            world.scale.rounds, ours=ours, nbdinfo=lambda _: process.run(nbdinfo(sock))[0]
        )
        expect(len(lengths), 1, "lengths of the list of extents")
        count, wanted = map_digest(sock)
        expect(answer_digest(server.port, path), (count, wanted), "extents")
    work = f"extents of {size // GIB} GiB"
    return [
        Figure(
            work,
            "nbdinfo --map",
            rounds.ratios("ours", "nbdinfo"),
            1.5,
            at_least=False,
            ours=f"{rounds.median('ours'):.2f} s",
            reference=f"{rounds.median('nbdinfo'):.2f} s",
            note=f"{count} extents, equal in both",
        ),
        Figure(work, "workers' memory growth", growth, 64, at_least=False, unit="MiB", worst=True),
        Figure(work, "first byte", first, 0.5, at_least=False, unit="s"),
    ]


def zero(world: World) -> list[Figure]:
    """Zero a huge image that is nearly all hole, in one request."""
    size = world.scale.zeroed
    image = world.sparse("zeroed.raw", size)
    places = [0, size // 2, size - MIB]
    with world.qemu_nbd(image, "--discard=unmap") as sock:
        path = world.server.add_nbd(sock)

        def seconds(_number: int) -> float:
            with image.open("r+b") as file:
                for place in places:
                    os.pwrite(file.fileno(), os.urandom(MIB), place)
            outcome = clients.run([_zero_job(world.server, path, size)])
            with image.open("rb") as file:
                found = [os.pread(file.fileno(), MIB, place) for place in places]
            expect([data.count(0) for data in found], [MIB] * len(places), "zeros")
            return outcome.seconds

        rounds = Rounds.take(world.scale.rounds, ours=seconds)
    image.unlink()
    work = f"zero {size // GIB} GiB of a sparse image"
    return [Figure(work, "one request", rounds.values["ours"], 2, at_least=False, unit="s")]


def _zero_job(server: Server, path: str, size: int) -> Job:
    body = f'{{"op":"zero","offset":0,"size":{size}}}'
    head = f"PATCH {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json"
    # The empty line that the client adds is white space after the JSON.
    return Job(
        "transfer", server.port, [f"{head}\r\nContent-Length: {len(body) + 4}\r\n\r\n{body}"]
    )


def memory(world: World) -> list[Figure]:
    """What each of eight concurrent readers costs, for small images and for huge ones."""
    sizes = {"small": world.scale.image, "large": world.scale.sparse}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(world.image_server("memory"))
        paths = {}
        for name, size in sizes.items():
            image = world.sparse(f"{name}.raw", size)
            paths[name] = server.add_nbd(stack.enter_context(world.qemu_nbd(image, "--read-only")))
        idle = process.resident(server.workers)

        def peak(name: str) -> float:
            head = f"GET {paths[name]} HTTP/1.1\r\nHost: bench"
            job = Job("transfer", server.port, [head], seconds=world.scale.hold_seconds)
            with process.MemorySampler(server.workers) as sampler:
                clients.run([job] * _READERS)
            return sampler.peak

        rounds = Rounds.take(
            world.scale.rounds, small=lambda _: peak("small"), large=lambda _: peak("large")
        )
    work = f"{_READERS} GETs of {sizes['large'] // GIB} GiB at once"
    each = [(value - idle) / MIB / _READERS for value in rounds.values["large"]]
    return [
        Figure(
            work,
            f"{_READERS} of {sizes['small'] / GIB:.2g} GiB, workers' memory",
            rounds.ratios("large", "small"),
            1.1,
            at_least=False,
            ours=f"{rounds.median('large') / MIB:.0f} MiB",
            reference=f"{rounds.median('small') / MIB:.0f} MiB",
        ),
        Figure(work, "growth per transfer", each, 8, at_least=False, unit="MiB", worst=True),
    ]


def spread(world: World) -> list[Figure]:
    """Start transfers one by one, and see which workers get them."""
    settings: dict[str, object] = {"workers": _WORKERS, "max_readers": 32}
    image = world.sparse("spread.raw", world.scale.sparse)
    alone: list[list[int]] = []
    loaded: list[list[int]] = []
    with (
        world.qemu_nbd(image, "--read-only") as sock,
        world.image_server("spread", settings=settings) as server,
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
