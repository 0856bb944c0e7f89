# SPDX-License-Identifier: Apache-2.0
"""Rows that show that a request costs the same, however much else there is on the host."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from lab.processes import LabFailed

from benchmark.cases import Case, Place
from benchmark.figures import KIB, Figure, Measure, Rounds
from benchmark.world import MAX_WRITERS, ImageServer, World
from imageserver.backends.table import KINDS
from imageserver.client.local.control_socket import ControlSocket
from imageserver.core.transfer import transfer_from_fields

_CASES = (Case("OPTIONS", 0, 1), Case("GET", 64 * KIB, 1), Case("PUT", 64 * KIB, 4))
#: The same within ten per cent.
_TARGET = 0.9
#: Unix sockets, idle connections, transfer files, registrations.
_MANY = (6000, 2000, 10_000, 5000)
_WORKERS = 16
_CROWD = Path(__file__).with_name("crowd.py")


def growth(world: World) -> list[Figure]:
    """Requests per second with much of something, against a server without."""
    image, socks = world.writable
    plain = Place(world.parallel.port, world.parallel.add_nbd(socks["ours"]), image, world.source)
    crowd = world.scale.crowd
    sockets, connections, files, registered = (count // crowd for count in _MANY)
    unix, idle = ("unix", sockets), (world.parallel.port, connections)
    figures = _compare(world, f"{sockets} Unix sockets elsewhere", plain, plain, *unix)
    figures += _compare(world, f"{connections} idle connections", plain, plain, *idle)
    with _server(world, "bare", 2) as server:
        bare = replace(plain, port=server.port, path=server.add_nbd(socks["ours"]))
        for what, workers, fill in (
            (f"{files} transfer files", 2, partial(_add_files, files)),
            (f"{registered} registrations", 2, partial(_register, registered)),
            (f"{_WORKERS} workers", _WORKERS, partial(_add_files, 0)),
        ):
            with _server(world, "grown", workers) as other:
                grown = replace(plain, port=other.port, path=other.add_nbd(socks["reference"]))
                fill(other)
                figures += _compare(world, what, bare, grown)
    return figures


@contextlib.contextmanager
def _server(world: World, name: str, workers: int) -> Iterator[ImageServer]:
    """Run a server where transfers can be registered: each look-up asks for those first."""
    control = world.directory / f"{name}.control"
    settings = {"workers": workers, "max_writers": MAX_WRITERS, "control_socket": control}
    with world.image_server(name, **settings) as server:
        yield server


def _add_files(count: int, server: ImageServer) -> None:
    for number in range(count):
        server.add(f"other-{number}", socket="/nowhere")


def _register(count: int, server: ImageServer) -> None:
    control = ControlSocket(server.env["IMAGESERVER_CONTROL_SOCKET"])
    for number in range(count):
        control.add(transfer_from_fields(f"other-{number}", {"socket": "/nowhere"}, KINDS))


def _compare(world: World, what: str, plain: Place, grown: Place, *crowd: object) -> list[Figure]:
    figures = []
    for case in _CASES:
        each = [case.measure(world.clients, place, world.scale.seconds) for place in (plain, grown)]
        measure = _crowded(each[1], crowd) if crowd else each[1]
        rounds = Rounds.take(world.scale.turns, without=each[0], ours=measure)
        figures.append(rounds.rate(f"{case}, {what}", "without", _TARGET, "without"))
    return figures


def _crowded(measure: Measure, crowd: tuple[object, ...]) -> Measure:
    command = [sys.executable, str(_CROWD), *map(str, crowd)]

    def crowded(number: int) -> float:
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe) as running:
            try:
                if not running.stdout or running.stdout.readline() != b"ready\n":
                    raise LabFailed(f"no crowd: {crowd}")
                return measure(number)
            finally:
                running.communicate(b"")

    return crowded
