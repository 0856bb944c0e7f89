# SPDX-License-Identifier: Apache-2.0
"""Where a worker's CPU time goes: py-spy looks at its stacks, a table names the parts.

py-spy reads the worker's memory from outside, so that nothing is changed in the product. It
slows the worker down, which is why how much a request takes is measured without it.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from lab.processes import LabFailed

from benchmark.cases import Case, Place
from benchmark.figures import KIB
from benchmark.watching import cpu_seconds
from benchmark.world import MAX_WRITERS, ImageServer, World

_CASES = (Case("OPTIONS", 0, 1), Case("GET", 64 * KIB, 1), Case("PUT", 64 * KIB, 1))
#: Samples per second; each stops the worker, and its every thread is looked at.
_RATE, _THREADS = 100, 4
#: Parts, by how a frame's file begins; of several, the longest. A frame of no part counts for
#: its caller.
PARTS = {
    "falcon/": "Falcon",
    "filelock/": "lock and slot",
    "gunicorn/": "parsing",
    "imageserver/backends/": "NBD",
    "imageserver/backends/nbd/peers": "lock and slot",
    "imageserver/core/slots": "lock and slot",
    "imageserver/images/": "lock and slot",
    "imageserver/observability/": "log and counters",
    "imageserver/runtime/": "lock and slot",
    "imageserver/server/": "receiving and sending",
    "imageserver/server/commonhead": "parsing",
    "imageserver/server/environ": "parsing",
    "imageserver/server/pools": "threads",
    "imageserver/server/request": "parsing",
    "imageserver/server/threads": "threads",
    "imageserver/transfers/": "transfer lookup",
    "imageserver/transfers/requests": "log and counters",
    "imageserver/transfers/tracking": "log and counters",
    "imageserver/transfers/usage": "log and counters",
    "imageserver/web/": "Falcon",
    "nbd.py": "NBD",
}
#: As a request meets them.
NAMES = (
    "threads",
    "receiving and sending",
    "parsing",
    "Falcon",
    "transfer lookup",
    "lock and slot",
    "NBD",
    "log and counters",
)
_FRAME = re.compile(r"\(([^()]+):[0-9]+\)$")
#: A stack that ends here waits for work, whatever the kernel thought at that moment.
_WAITING = re.compile(r"(^|;)(Threads\._run|[^;]*(wait|select|accept)) \([^;]*\)$")


@dataclass(frozen=True, slots=True)
class Cost:
    """What one kind of request costs a worker."""

    work: str
    seconds: float
    """CPU time."""
    shares: dict[str, float]
    """By the names of parts; together 1."""


def shares(stacks: str) -> dict[str, float]:
    """Return the share of each part of what ``py-spy record --format raw`` has found.

    Raises:
        LabFailed: it has found no request.
    """
    found: Counter[str] = Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        if "serve (" in stack and not _WAITING.search(stack):
            found[_part(stack.split(";"))] += int(count)
    if not (total := found.total()):
        raise LabFailed("py-spy has seen no request")
    return {name: found[name] / total for name in NAMES}


def _part(stack: list[str]) -> str:
    for frame in reversed(stack):
        path = match[1] if (match := _FRAME.search(frame)) else ""
        if found := max((start for start in PARTS if path.startswith(start)), default="", key=len):
            return PARTS[found]
    return NAMES[0]


def costs(world: World) -> list[Cost]:
    """Measure and sample OPTIONS, GET and PUT of 64 KiB over NBD.

    Raises:
        LabFailed: py-spy is missing.
    """
    spy = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if spy is None:
        raise LabFailed("py-spy is missing: .venv/bin/python -m pip install py-spy")
    # A thread that could run counts as one that does. So the worker has a CPU of its own, where
    # whom it wakes does not take its place.
    *others, own = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, others or [own])  # who is started from here on inherits it
    image, socks = world.writable
    settings = {"workers": 1, "max_writers": MAX_WRITERS, "threads": _THREADS}
    with world.image_server("shares", **settings) as server:
        for task in os.listdir(f"/proc/{server.worker_pids()[0]}/task"):
            os.sched_setaffinity(int(task), [own])
        place = Place(server.port, server.add_nbd(socks["ours"]), image, world.source)
        return [_cost(world, spy, server, case, place) for case in _CASES]


def _cost(world: World, spy: str, server: ImageServer, case: Case, place: Place) -> Cost:
    pids = server.worker_pids()
    (job,) = case.checked(world.clients, place)

    def seconds() -> float:
        before = cpu_seconds(pids)
        requests = world.clients.run([replace(job, count=1, seconds=world.scale.seconds)]).requests
        return (cpu_seconds(pids) - before) / requests

    spent = median(seconds() for _ in range(world.scale.turns))
    stacks = world.directory / "stacks"
    command = [spy, "record", "--format=raw", f"--pid={pids[0]}", f"--rate={_RATE}"]
    command += [f"--duration={world.scale.sampled_seconds}", f"--output={stacks}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        world.clients.run([replace(job, count=1, seconds=world.scale.sampled_seconds)])
    return Cost(str(case).partition(",")[0], spent, shares(stacks.read_text(encoding="utf-8")))


def draw(found: Sequence[Cost]) -> str:
    """Return a stacked bar for each, as SVG; it follows the reader's choice of light or dark."""
    most = max(cost.seconds for cost in found)
    lines = []
    for row, cost in enumerate(found):
        x, y = float(_LEFT), row * _ROW
        lines.append(f'<text x="0" y="{y + 22}">{cost.work}</text>')
        for number, name in enumerate(NAMES):
            width = cost.shares[name] * cost.seconds / most * _WIDTH
            microseconds = f"{cost.shares[name] * cost.seconds * 1e6:.0f}"
            lines.append(
                f'<rect class="k{number}" x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="28">'
                f"<title>{name}: {microseconds} µs</title></rect>"
            )
            if width > _LABEL:
                label = f'x="{x + width / 2:.1f}" y="{y + 22}"'
                lines.append(f'<text class="in" {label}>{microseconds}</text>')
            x += width
        lines.append(f'<text x="{x + 8:.1f}" y="{y + 22}">{cost.seconds * 1e6:.0f} µs</text>')
    top = len(found) * _ROW + 12
    for number, name in enumerate(NAMES):
        x, y = number % 4 * 200, top + number // 4 * 24
        lines.append(f'<rect class="k{number}" x="{x}" y="{y}" width="14" height="14"/>')
        lines.append(f'<text x="{x + 20}" y="{y + 12}">{name}</text>')
    height = top + (len(NAMES) + 3) // 4 * 24
    return _SVG.format(height=height, body="\n".join(lines))


_ROW, _LEFT, _WIDTH, _LABEL = 40, 130, 590, 26
_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 -8 824 {height}" role="img">
<title>CPU time of a worker per request, by what it is spent on</title>
<style>
text{{font:13px system-ui,sans-serif;fill:#1f2328}}
.in{{font-size:11px;fill:#fff;text-anchor:middle}}
.back{{fill:#fff}}
.k0{{fill:#8250df}}.k1{{fill:#1a7f37}}.k2{{fill:#bc4c00}}.k3{{fill:#0969da}}
.k4{{fill:#57606a}}.k5{{fill:#0f6c74}}.k6{{fill:#bf3989}}.k7{{fill:#9a6700}}
@media (prefers-color-scheme:dark){{text{{fill:#e6edf3}}.back{{fill:#0d1117}}}}
</style>
<rect class="back" x="-12" y="-8" width="824" height="{height}"/>
{body}
</svg>
"""
