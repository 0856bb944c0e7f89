# SPDX-License-Identifier: Apache-2.0
"""Rows that move data: whole images and ranges, over NBD and from files."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import clients
import process
from client import Job
from figures import Figure, Rounds
from verify import digest, expect
from world import GIB, KIB, MIB, SHIFT, Server, World

_STREAMS = 4
_HEADS = 64


@dataclass(slots=True)
class Side:
    """One server under comparison, and the image it is asked for."""

    port: int
    path: str
    server: Server | None = None
    trust: str = ""
    """The CA of a side that speaks TLS."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of the server, per timed run."""

    def get(self, *, start: int = 0, length: int = 0, hashed: bool = False) -> Job:
        """Return a job that reads the image, or a range of it."""
        head = _head("GET", self.path)
        if length:
            head += f"\r\nRange: bytes={start}-{start + length - 1}"
        return Job("transfer", self.port, [head], trust=self.trust, digest=hashed)

    def put(self, source: Path, offset: int, length: int) -> Job:
        """Return a job that writes the image."""
        head = _head("PUT", self.path) + f"\r\nContent-Length: {length}"
        return Job(
            "transfer",
            self.port,
            [head],
            file=str(source),
            offset=offset,
            length=length,
            trust=self.trust,
        )

    def timed(self, job: Job, wanted: int | None = None) -> float:
        """Run a job; return its seconds, and note the server's CPU time."""
        pids = self.server.pids if self.server else []
        before = process.cpu_seconds(pids)
        outcome = clients.run([job])
        self.cpu.append(process.cpu_seconds(pids) - before)
        if wanted is not None:
            expect(outcome.received, wanted, f"bytes of {self.path}")
        return outcome.seconds


def get_nbd(world: World) -> list[Figure]:
    """GET a whole image over NBD: speed and CPU."""
    image, socks = world.readable
    size = world.scale.image
    ours, reference = _nbd_sides(world, socks)
    for side in (ours, reference):
        _check_get(side, image)
    rounds = Rounds.take(
        world.scale.rounds,
        ours=lambda _: ours.timed(ours.get(), size),
        reference=lambda _: reference.timed(reference.get(), size),
        nbdcopy=lambda _: _nbdcopy(_uri(socks["nbdcopy"]), "null:"),
    )
    work = f"GET {_size(size)} over NBD, one stream"
    return [
        _speed(work, "reference", rounds, size, 2.0),
        _speed(work, "nbdcopy", rounds, size, 0.75),
        _cpu(f"CPU of GET {_size(size)} over NBD", ours, reference, size),
    ]


def put_nbd(world: World) -> list[Figure]:
    """PUT a whole image over NBD: speed and CPU."""
    image, socks = world.writable
    other, _ = world.readable
    size, source = world.scale.image, world.source
    ours, reference = _nbd_sides(world, socks)
    rounds = Rounds.take(
        world.scale.rounds,
        ours=_checked_put(ours, source, 0, image),
        reference=_checked_put(reference, source, SHIFT, image),
        nbdcopy=_checked(
            lambda: _nbdcopy(str(other), _uri(socks["nbdcopy"])), image, digest(other, (0, size))
        ),
    )
    work = f"PUT {_size(size)} over NBD, one stream"
    return [
        _speed(work, "reference", rounds, size, 2.4),
        _speed(work, "nbdcopy", rounds, size, 0.75),
        _cpu(f"CPU of PUT {_size(size)} over NBD", ours, reference, size),
    ]


def get_file(world: World) -> list[Figure]:
    """GET an image file."""
    image, _ = world.readable
    size = world.scale.image
    ours = Side(world.server.port, world.server.add_file(image), world.server)
    reference = Side(world.reference.port, f"/{image.name}", world.reference)
    nginx = Side(world.nginx, f"/{image.name}")
    for side in (ours, reference, nginx):
        _check_get(side, image)
    rounds = Rounds.take(
        world.scale.rounds,
        ours=lambda _: ours.timed(ours.get(), size),
        nginx=lambda _: nginx.timed(nginx.get(), size),
        reference=lambda _: reference.timed(reference.get(), size),
    )
    work = f"GET {_size(size)} file"
    return [
        _speed(work, "nginx", rounds, size, 1.0),
        _speed(work, "reference", rounds, size, 1.1),
    ]


def put_file(world: World) -> list[Figure]:
    """PUT an image file: replaced as a whole by us, written in place by the reference."""
    ours_file, reference_file = world.data("ours.raw", world.scale.image), world.file
    size, source = world.scale.image, world.source
    ours = Side(world.server.port, world.server.add_file(ours_file), world.server)
    reference = Side(world.reference.port, f"/{reference_file.name}", world.reference)

    def put(side: Side, target: Path) -> Callable[[int], float]:
        # The two never write the same file, so each alternates between two contents itself.
        checked = [_checked_put(side, source, offset, target) for offset in (0, SHIFT)]
        return lambda number: checked[number % 2](number)

    rounds = Rounds.take(
        world.scale.rounds, ours=put(ours, ours_file), reference=put(reference, reference_file)
    )
    ours_file.unlink()
    return [_speed(f"PUT {_size(size)} file", "reference", rounds, size, 1.2)]


def parallel(world: World) -> list[Figure]:
    """GET one image over NBD in four ranges at once."""
    image, socks = world.readable
    size = world.scale.image
    part = size // _STREAMS
    starts = range(0, size, part)
    wanted = [digest(image, (start, part)) for start in starts]

    def seconds(side: Side, *, hashed: bool = False) -> float:
        jobs = [side.get(start=start, length=part, hashed=hashed) for start in starts]
        outcome = clients.run(jobs, status=206)
        expect(outcome.received, size, f"bytes of {side.path}")
        if hashed:
            expect(outcome.digests, wanted, f"ranges of {side.path}")
        return outcome.seconds

    ours, reference = _nbd_sides(world, socks)
    for side in (ours, reference):
        seconds(side, hashed=True)
    rounds = Rounds.take(
        world.scale.rounds, ours=lambda _: seconds(ours), reference=lambda _: seconds(reference)
    )
    return [_speed(f"{_STREAMS} range GETs over NBD at once", "reference", rounds, size, 1.1)]


def small(world: World) -> list[Figure]:
    """GET ranges of 64 KiB and of 1 MiB one after the other on kept-alive connections."""
    return [_ranges(world, 64 * KIB, "64 KiB", 1.5), _ranges(world, MIB, "1 MiB", 1.0)]


def _ranges(world: World, length: int, name: str, target: float) -> Figure:
    image, socks = world.readable
    sides = _nbd_sides(world, socks)
    chance = random.Random(1)  # noqa: S311 - the same ranges for everybody, each time
    places = [
        [chance.randrange(world.scale.image // length) * length for _ in range(_HEADS)]
        for _ in range(_STREAMS)
    ]
    wanted = [digest(image, *[(start, length) for start in starts]) for starts in places]

    def jobs(side: Side) -> list[Job]:
        return [
            Job("loop", side.port, [side.get(start=s, length=length).heads[0] for s in starts])
            for starts in places
        ]

    def rate(side: Side) -> float:
        timed = jobs(side)
        for job in timed:
            job.seconds = world.scale.seconds
        outcome = clients.run(timed, status=206)
        requests = sum(result.requests for result in outcome.results)
        expect(outcome.received, requests * length, f"bytes of {side.path}")
        return outcome.requests_per_second

    for side in sides:
        checked = jobs(side)
        for job in checked:
            job.count, job.digest = _HEADS, True
        expect(clients.run(checked, status=206).digests, wanted, f"ranges of {side.path}")
    rounds = Rounds.take(
        world.scale.rounds, ours=lambda _: rate(sides[0]), reference=lambda _: rate(sides[1])
    )
    return Figure(
        f"{name} range GETs over NBD, {_STREAMS} connections",
        "reference",
        rounds.ratios("ours", "reference"),
        target,
        ours=f"{rounds.median('ours'):.0f}/s",
        reference=f"{rounds.median('reference'):.0f}/s",
    )


def tls(world: World) -> list[Figure]:
    """GET and PUT a whole image over NBD with TLS, against plain HTTP."""
    size, source = world.scale.image, world.source
    (readable, read_socks), (writable, write_socks) = world.readable, world.writable
    pki = world.pki
    settings = {"tls_cert": pki / "server.crt", "tls_key": pki / "server.key"}
    with world.image_server("tls", settings=settings) as server:

        def sides(sock: Path) -> tuple[Side, Side]:
            return (
                Side(server.port, server.add_nbd(sock), server, str(pki / "ca.crt")),
                Side(world.server.port, world.server.add_nbd(sock), world.server),
            )

        ours, plain = sides(read_socks["ours"])
        _check_get(ours, readable)
        got = Rounds.take(
            world.scale.rounds,
            ours=lambda _: ours.timed(ours.get(), size),
            plain=lambda _: plain.timed(plain.get(), size),
        )
        writing, plainly = sides(write_socks["ours"])
        put = Rounds.take(
            world.scale.rounds,
            ours=_checked_put(writing, source, 0, writable),
            plain=_checked_put(plainly, source, SHIFT, writable),
        )
    against_plain: dict[str, Any] = {"against": "plain", "target": None}
    return [
        _speed(f"GET {_size(size)} over NBD with TLS", "plain", got, size),
        replace(_cpu(f"CPU of GET {_size(size)} with TLS", ours, plain, size), **against_plain),
        _speed(f"PUT {_size(size)} over NBD with TLS", "plain", put, size),
        replace(
            _cpu(f"CPU of PUT {_size(size)} with TLS", writing, plainly, size), **against_plain
        ),
    ]


def _head(method: str, path: str) -> str:
    return f"{method} {path} HTTP/1.1\r\nHost: bench"


def _nbd_sides(world: World, socks: dict[str, Path]) -> tuple[Side, Side]:
    return (
        Side(world.server.port, world.server.add_nbd(socks["ours"]), world.server),
        Side(world.reference.port, f"/{socks['reference'].name}", world.reference),
    )


def _check_get(side: Side, image: Path) -> None:
    wanted = digest(image, (0, image.stat().st_size))
    expect(clients.run([side.get(hashed=True)]).digests, [wanted], side.path)


def _checked_put(side: Side, source: Path, offset: int, target: Path) -> Callable[[int], float]:
    size = target.stat().st_size
    job = side.put(source, offset, size)
    return _checked(lambda: side.timed(job), target, digest(source, (offset, size)))


def _checked(write: Callable[[], float], target: Path, wanted: str) -> Callable[[int], float]:
    """Return a measure that writes, then looks at what has been written."""

    def measure(_number: int) -> float:
        seconds = write()
        expect(digest(target, (0, target.stat().st_size)), wanted, str(target))
        return seconds

    return measure


def _nbdcopy(source: str, target: str) -> float:
    return process.run([process.program("nbdcopy"), source, target])[0]


def _uri(sock: Path) -> str:
    return f"nbd+unix:///?socket={sock}"


def _speed(
    work: str, against: str, rounds: Rounds, size: int, target: float | None = None
) -> Figure:
    def speed(name: str) -> str:
        return f"{size / MIB / rounds.median(name):.0f} MiB/s"

    ratios = rounds.ratios(against, "ours")
    return Figure(work, against, ratios, target, ours=speed("ours"), reference=speed(against))


def _cpu(work: str, ours: Side, reference: Side, size: int) -> Figure:
    rounds = Rounds({"ours": ours.cpu, "reference": reference.cpu})

    def cost(name: str) -> str:
        return f"{rounds.median(name) * GIB / size:.2f} s/GiB"

    return Figure(
        work,
        "reference",
        # A tick at least: quick runs cost less.
        [max(a, 0.01) / max(b, 0.01) for a, b in zip(ours.cpu, reference.cpu, strict=True)],
        0.6,
        at_least=False,
        ours=cost("ours"),
        reference=cost("reference"),
    )


def _size(size: int) -> str:
    return f"{size // GIB} GiB" if size >= GIB else f"{size // MIB} MiB"
