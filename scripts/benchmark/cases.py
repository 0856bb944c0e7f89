# SPDX-License-Identifier: Apache-2.0
"""What most clients do: small requests, one after the other, by the thousand."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmark.client import Job, head
from benchmark.clients import Clients
from benchmark.figures import MIB, Measure, shown
from benchmark.verify import digest, expect
from benchmark.watching import cpu_seconds

#: A connection goes round this many places of an image; fewer if that is much to check.
_PLACES = 64
_AT_ONCE = 32 * MIB


@dataclass(frozen=True, slots=True)
class Place:
    """An image as a server has it."""

    port: int
    path: str
    image: Path
    """The file behind it."""
    source: Path
    """Bodies are the bytes of this file from ``offset`` on: no two servers write the same."""
    offset: int = 0
    pids: Sequence[int] = ()
    """The server's processes, whose CPU time counts."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of the server for each request, per timed run."""


@dataclass(frozen=True, slots=True)
class Case:
    """One line: what each connection asks for, again and again."""

    kind: str
    """``GET`` or ``PUT`` of a range, ``zero``, ``flush``, ``OPTIONS``."""
    size: int
    connections: int
    target: float | None = None

    def __str__(self) -> str:
        """Return what the table calls it."""
        verb = self.kind if self.kind in {"GET", "PUT", "OPTIONS"} else f"PATCH {self.kind}"
        size = f" of {shown(self.size)}" if self.size else ""
        return f"{verb}{size}, {self.connections} connection{'s'[self.connections == 1 :]}"

    def places(self, connection: int, image: int) -> list[int]:
        """Return where a connection's requests begin: the same for everybody, each time."""
        chance = random.Random(connection)
        count = max(1, min(_PLACES, _AT_ONCE // self.size))
        return [chance.randrange(image // self.size) * self.size for _ in range(count)]

    def request(self, path: str, start: int) -> str:
        """Return the request for what begins at ``start``, but for the body of a PUT."""
        last = start + self.size - 1
        if self.kind == "GET":
            return head("GET", path, Range=f"bytes={start}-{last}")
        if self.kind == "PUT":  # oVirt's daemon flushes unless told not to; ours knows that, too
            fields = {"Content_Length": self.size, "Content_Range": f"bytes {start}-{last}/*"}
            return head("PUT", f"{path}?flush=n", **fields)
        if self.kind == "OPTIONS":
            return head("OPTIONS", path)
        body = f'{{"op":"{self.kind}"}}'
        if self.kind == "zero":
            body = f'{{"op":"zero","offset":{start},"size":{self.size}}}'
        length = {"Content_Length": len(body)}
        return head("PATCH", path, Content_Type="application/json", **length) + body

    @property
    def is_stream(self) -> bool:
        """Tell whether one request is a measurement."""
        return self.size > _AT_ONCE

    def rate(self, per_second: float) -> str:
        """Return requests per second as the table has them."""
        if self.is_stream:
            return f"{per_second * self.size / MIB:.0f} MiB/s"
        return f"{per_second:.0f}/s"

    def measure(self, clients: Clients, place: Place, seconds: float) -> Measure:
        """Check that it does what it should; return what measures requests per second."""
        jobs = self.checked(clients, place)
        if not self.is_stream:
            jobs = [replace(job, count=1, seconds=seconds) for job in jobs]

        def measured(_number: int) -> float:
            before = cpu_seconds(place.pids)
            outcome = clients.run(jobs)
            place.cpu.append((cpu_seconds(place.pids) - before) / outcome.requests)
            return outcome.requests_per_second

        return measured

    def checked(self, clients: Clients, place: Place) -> list[Job]:
        """Return a job for each connection, once it is known that they do what they should."""
        jobs = [self._job(place, number) for number in range(self.connections)]
        self._check(clients, place, jobs)
        return jobs

    def _job(self, place: Place, number: int) -> Job:
        """Return a job for a connection that makes each of its requests once."""
        starts = self._starts(place, number)
        requests = [self.request(place.path, start) for start in starts]
        job = Job(place.port, requests, count=len(requests))
        if self.kind == "GET":
            return replace(job, status=206, size=self.size)
        if self.kind == "PUT":
            return replace(job, file=str(place.source), offset=place.offset, length=self.size)
        return job

    def _starts(self, place: Place, number: int) -> list[int]:
        return self.places(number, place.image.stat().st_size) if self.size else [0]

    def _check(self, clients: Clients, place: Place, jobs: list[Job]) -> None:
        starts = [self._starts(place, number) for number in range(self.connections)]
        spans = [(start, self.size) for each in starts for start in each]
        if self.kind == "zero":
            with place.image.open("r+b") as file:
                for start, size in spans:
                    os.pwrite(file.fileno(), os.urandom(size), start)
        outcome = clients.run([replace(job, digest=self.kind == "GET") for job in jobs])
        if self.kind == "GET":
            wanted = [digest(place.image, *[(s, self.size) for s in each]) for each in starts]
            expect(outcome.digests, wanted, f"{self} of {place.path}")
        elif self.kind in {"PUT", "zero"}:
            path, offset = place.source, place.offset
            if self.kind == "zero":
                path, offset = Path("/dev/zero"), 0
            wanted = [digest(path, (offset, self.size))] * len(spans)
            expect([digest(place.image, span) for span in spans], wanted, f"{self} of {place.path}")
