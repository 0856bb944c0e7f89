# SPDX-License-Identifier: Apache-2.0
"""Rows of what a request costs a worker: CPU time, against bare Falcon, and system calls."""

import re
import shutil
import signal
import subprocess
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace

from lab.processes import LabFailed

from benchmark.cases import Case, Place
from benchmark.client import Job
from benchmark.figures import KIB, Figure, Measure, Rounds
from benchmark.watching import cpu_seconds
from benchmark.world import MAX_WRITERS, ImageServer, World

_FALCON = ("--worker-class", "gthread", "--threads", "64", "benchmark.constant:app")
_TRACED = 200
#: A note names the calls that are made most often.
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Line:
    """What is asked for, and what that may cost."""

    case: Case
    most: float
    """CPU time, over that of an OPTIONS of bare Falcon under gunicorn's gthread."""
    writers: int = 1
    is_file: bool = False
    most_calls: float | None = None

    @property
    def work(self) -> str:
        """What the table calls it."""
        where = "of a file" if self.is_file else f"over NBD, MAX_WRITERS {self.writers}"
        name = str(self.case).partition(",")[0]
        return name if self.case.kind == "OPTIONS" else f"{name} {where}"


_LINES = (
    Line(Case("OPTIONS", 0, 1), 0.8),
    Line(Case("GET", 64 * KIB, 1), 1.6, most_calls=18),
    Line(Case("GET", 4 * KIB, 1), 1.2, is_file=True),
    Line(Case("PUT", 64 * KIB, 1), 2.0, most_calls=35),
    Line(Case("PUT", 64 * KIB, 1), 1.6, MAX_WRITERS, most_calls=35),
    Line(Case("flush", 0, 1), 1.6),
    Line(Case("flush", 0, 1), 1.6, MAX_WRITERS),
)


def cpu(world: World) -> list[Figure]:
    """CPU time and system calls of a worker, per request."""
    image, socks = world.writable
    jobs: dict[str, list[Job]] = {}
    figures = []
    with ExitStack() as stack:

        def serve(name: str, *arguments: str, **settings: object) -> ImageServer:
            more = {"workers": 1} | settings
            return stack.enter_context(world.image_server(name, *arguments, **more))

        servers = {count: serve(f"cpu{count}", max_writers=count) for count in (1, MAX_WRITERS)}
        falcon = serve("falcon", *_FALCON)
        for line in _LINES:
            server = servers[line.writers]
            add = server.add_file if line.is_file else server.add_nbd
            path = add(image if line.is_file else socks["ours"])
            place = Place(server.port, path, image, world.source)
            jobs[line.work] = line.case.checked(world.clients, place)
        bare = Place(falcon.port, "/images/x", image, world.source)
        measures = {
            line.work: _cpu(world, servers[line.writers], jobs[line.work]) for line in _LINES
        }
        measures |= {"": _cpu(world, falcon, _LINES[0].case.checked(world.clients, bare))}
        rounds = Rounds.take(world.scale.turns, **measures)
        for line in _LINES:
            figure = Figure(f"worker's CPU of {line.work}", "bare Falcon", [], line.most)
            figures.append(rounds.less(figure, lambda s: f"{s * 1e6:.0f} µs", "", line.work))
            figures += _calls(world, line, servers[line.writers], jobs[line.work])
    return figures


def _cpu(world: World, server: ImageServer, jobs: list[Job]) -> Measure:
    pids = server.worker_pids()
    jobs = [replace(job, count=1, seconds=world.scale.seconds) for job in jobs]

    def measure(_number: int) -> float:
        before = cpu_seconds(pids)
        requests = world.clients.run(jobs).requests
        return (cpu_seconds(pids) - before) / requests

    return measure


def _calls(world: World, line: Line, server: ImageServer, jobs: list[Job]) -> list[Figure]:
    """Count the system calls of a worker by strace; none of it where there is no strace."""
    if not (strace := shutil.which("strace")):
        return []
    (pid,) = server.worker_pids()
    path = world.directory / "strace"
    command = [strace, "--follow-forks", "--summary-only", f"--output={path}", f"--attach={pid}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as running:
        if running.stderr:
            running.stderr.readline()  # attached
        world.clients.run([replace(job, count=_TRACED) for job in jobs])
        running.send_signal(signal.SIGINT)
    counts = calls(path.read_text(encoding="utf-8"))
    figure = Figure(f"system calls of {line.work}", "strace -c", [], line.most_calls)
    figure.at_least, figure.unit = False, "calls"
    figure.values = [sum(counts.values()) / _TRACED]
    often = [f"{name} {count / _TRACED:.1f}" for name, count in counts.most_common(_SHOWN)]
    figure.note = ", ".join(often)
    return [figure]


def calls(summary: str) -> Counter[str]:
    """Return how often each system call was made, as ``strace -c`` says.

    Raises:
        LabFailed: it says of none.
    """
    found = re.findall(r"^ *[0-9.]+ +[0-9.]+ +[0-9]+ +([0-9]+) .*?(\w+)$", summary, re.MULTILINE)
    counts = Counter({name: int(count) for count, name in found if name != "total"})
    if not counts:
        raise LabFailed(f"strace has counted nothing: {summary[-200:]}")
    return counts
