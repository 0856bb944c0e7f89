# SPDX-License-Identifier: Apache-2.0
"""Rows that move data: whole images and ranges, over NBD and from files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lab.processes import program

from benchmark.client import Job, head
from benchmark.clients import Clients, Outcome
from benchmark.figures import GIB, Figure, Measure, Rounds, shown
from benchmark.verify import digest, expect
from benchmark.watching import cpu_seconds, timed
from benchmark.world import SHIFT, World

_STREAMS = 4
#: A tick at least: quick runs cost less.
_TICK = 0.01


@dataclass(slots=True)
class Side:
    """One server under comparison, and the image it is asked for."""

    clients: Clients
    port: int
    path: str
    pids: Sequence[int] = ()
    """Whose CPU time counts."""
    trust: str = ""
    """The CA of a side that speaks TLS."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of the server, per timed run."""

    def get(self, *, start: int = 0, length: int = 0, hashed: bool = False) -> Job:
        """Return a job that reads the image, or a range of it."""
        fields = {"Range": f"bytes={start}-{start + length - 1}"} if length else {}
        requests = [head("GET", self.path, **fields)]
        status = 206 if length else 200
        return Job(self.port, requests, status, trust=self.trust, digest=hashed)

    def put(self, source: Path, offset: int, length: int) -> Job:
        """Return a job that writes the image."""
        job = Job(self.port, [head("PUT", self.path, Content_Length=length)], trust=self.trust)
        return replace(job, file=str(source), offset=offset, length=length)

    def run(self, job: Job) -> Outcome:
        """Run a job; note the server's CPU time."""
        before = cpu_seconds(self.pids)
        outcome = self.clients.run([job])
        self.cpu.append(cpu_seconds(self.pids) - before)
        return outcome

    def reads(self, image: Path) -> Measure:
        """Check that the image arrives; return what measures that."""
        size = image.stat().st_size
        found = self.clients.run([self.get(hashed=True)]).digests
        expect(found, [digest(image, (0, size))], self.path)

        def measure(_number: int) -> float:
            outcome = self.run(self.get())
            expect(outcome.received, size, f"bytes of {self.path}")
            return outcome.seconds

        return measure

    def writes(self, source: Path, offset: int, target: Path) -> Measure:
        """Return what measures a write of all of the target, from some bytes of a source."""
        size = target.stat().st_size
        job, wanted = self.put(source, offset, size), digest(source, (offset, size))
        return checked(lambda: self.run(job).seconds, target, wanted)


def checked(write: Callable[[], float], target: Path, wanted: str) -> Measure:
    """Return a measure that writes, then looks at what has been written."""

    def measure(_number: int) -> float:
        seconds = write()
        expect(digest(target, (0, target.stat().st_size)), wanted, str(target))
        return seconds

    return measure


def cpu(
    work: str, against: str, sides: tuple[Side, Side], size: int, target: float | None = None
) -> Figure:
    """Compare the CPU time of two servers."""
    ours, reference = ([max(spent, _TICK) for spent in side.cpu] for side in sides)
    rounds = Rounds({"ours": ours, "reference": reference})
    figure = Figure(work, against, [], target)
    return rounds.less(figure, lambda spent: f"{spent * GIB / size:.2f} s/GiB", "reference")


def _sides(world: World, path: str, name: str) -> tuple[Side, Side]:
    server, reference = world.server, world.reference
    return (
        Side(world.clients, server.port, path, server.pids),
        Side(world.clients, reference.port, f"/{name}", reference.pids),
    )


def _nbd_sides(world: World, socks: dict[str, Path]) -> tuple[Side, Side]:
    return _sides(world, world.server.add_nbd(socks["ours"]), socks["reference"].name)


def _file_sides(world: World, image: Path, other: Path) -> tuple[Side, Side]:
    return _sides(world, world.server.add_file(image), other.name)


def _nbdcopy(source: object, target: object) -> float:
    return timed([program("nbdcopy"), str(source), str(target)])[0]


def _uri(sock: Path) -> str:
    return f"nbd+unix:///?socket={sock}"


def get_nbd(world: World) -> list[Figure]:
    """GET a whole image over NBD: speed and CPU."""
    image, socks = world.readable
    size = world.scale.image
    ours, reference = _nbd_sides(world, socks)
    rounds = Rounds.take(
        world.scale.rounds,
        ours=ours.reads(image),
        reference=reference.reads(image),
        nbdcopy=lambda _: _nbdcopy(_uri(socks["nbdcopy"]), "null:"),
    )
    work = f"GET {shown(size)} over NBD"
    return [
        rounds.speed(f"{work}, one stream", "reference", size, 2.0),
        rounds.speed(f"{work}, one stream", "nbdcopy", size, 0.75),
        cpu(f"CPU of {work}", "reference", (ours, reference), size, 0.6),
    ]


def put_nbd(world: World) -> list[Figure]:
    """PUT a whole image over NBD: speed and CPU."""
    image, socks = world.writable
    other, _ = world.readable
    size, source = world.scale.image, world.source
    ours, reference = _nbd_sides(world, socks)
    copied = digest(other, (0, size))
    rounds = Rounds.take(
        world.scale.rounds,
        ours=ours.writes(source, 0, image),
        reference=reference.writes(source, SHIFT, image),
        nbdcopy=checked(lambda: _nbdcopy(other, _uri(socks["nbdcopy"])), image, copied),
    )
    work = f"PUT {shown(size)} over NBD"
    return [
        rounds.speed(f"{work}, one stream", "reference", size, 2.4),
        rounds.speed(f"{work}, one stream", "nbdcopy", size, 0.75),
        cpu(f"CPU of {work}", "reference", (ours, reference), size, 0.6),
    ]


def get_file(world: World) -> list[Figure]:
    """GET an image file."""
    image, _ = world.readable
    size = world.scale.image
    ours, reference = _file_sides(world, image, image)
    rounds = Rounds.take(
        world.scale.rounds,
        ours=ours.reads(image),
        nginx=Side(world.clients, world.nginx, f"/{image.name}").reads(image),
        reference=reference.reads(image),
    )
    work = f"GET {shown(size)} file"
    return [
        rounds.speed(work, "nginx", size, 1.0),
        rounds.speed(work, "reference", size, 1.1),
    ]


def put_file(world: World) -> list[Figure]:
    """PUT an image file: both write another, sync it and rename it."""
    ours_file, reference_file = world.data("ours.raw"), world.file
    size, source = world.scale.image, world.source
    ours, reference = _file_sides(world, ours_file, reference_file)

    def put(side: Side, target: Path) -> Measure:
        # The two never write the same file, so each alternates between two contents itself.
        each = [side.writes(source, offset, target) for offset in (0, SHIFT)]
        return lambda number: each[number % 2](number)

    rounds = Rounds.take(
        world.scale.rounds, ours=put(ours, ours_file), reference=put(reference, reference_file)
    )
    ours_file.unlink()
    return [rounds.speed(f"PUT {shown(size)} file", "reference", size, 0.9)]


def parallel(world: World) -> list[Figure]:
    """GET one image over NBD in four ranges at once."""
    image, socks = world.readable
    size = world.scale.image
    part = size // _STREAMS
    starts = range(0, size, part)
    wanted = [digest(image, (start, part)) for start in starts]

    def seconds(side: Side, *, hashed: bool = False) -> float:
        jobs = [side.get(start=start, length=part, hashed=hashed) for start in starts]
        outcome = side.clients.run(jobs)
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
    return [rounds.speed(f"{_STREAMS} range GETs over NBD at once", "reference", size, 1.1)]


def tls(world: World) -> list[Figure]:
    """GET and PUT a whole image over NBD with TLS, against plain HTTP."""
    size, source, pki = world.scale.image, world.source, world.pki
    settings = {"tls_cert": pki / "server.crt", "tls_key": pki / "server.key"}
    figures = []
    with world.image_server("tls", **settings) as server:
        for method, (image, socks) in (("GET", world.readable), ("PUT", world.writable)):
            sides = tuple(
                Side(world.clients, each.port, each.add_nbd(socks["ours"]), each.pids, trust)
                for each, trust in ((server, str(pki / "ca.crt")), (world.server, ""))
            )
            ours, plain = (
                side.reads(image) if method == "GET" else side.writes(source, offset, image)
                for side, offset in zip(sides, (0, SHIFT), strict=True)
            )
            rounds = Rounds.take(world.scale.rounds, ours=ours, plain=plain)
            work = f"{method} {shown(size)}"
            figures += [
                rounds.speed(f"{work} over NBD with TLS", "plain", size),
                cpu(f"CPU of {work} with TLS", "plain", (sides[0], sides[1]), size),
            ]
    return figures
