# SPDX-License-Identifier: Apache-2.0
"""Rows of imagectl, against the clients that others use; a client's start counts as its time."""

import compileall
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from lab.processes import ROOT, program

from benchmark.figures import MIB, Figure, Measure, Rounds, shown
from benchmark.verify import digest, expect
from benchmark.watching import timed
from benchmark.world import ImageServer, World

_CONNECTIONS = (1, 4)
_OVIRT = """
import sys
from ovirt_imageio import client
way, source, target, workers = sys.argv[1:]
more = {"fmt": "raw"} if way == "download" else {}
getattr(client, way)(source, target, None, secure=False, max_workers=int(workers), **more)
"""
#: The data of the large sparse image: so many pieces, this part of an image's bytes.
_PIECES, _PART = 100, 5

Command = Callable[[str, str], list[str]]
"""What copies a source to a target."""


def imagectl_download(world: World) -> list[Figure]:
    """Download a whole image over NBD."""
    image, size = world.data("read.raw"), world.scale.image
    tools = {"curl": lambda source, target: ["curl", "-fsS", "-o", target, source]}
    tools |= _tools("download")
    with _served(world, world.server, image, tools, "--read-only") as urls:
        wanted = digest(image, (0, size))
        measures = {name: _downloads(world, tools[name], urls[name], wanted) for name in tools}
        rounds = Rounds.take(world.scale.rounds, **measures)
    work = f"imagectl download {shown(size)} over NBD"
    return [_figure(work, rounds, n, who, size) for n in _CONNECTIONS for who in ("curl", "ovirt")]


def imagectl_upload(world: World) -> list[Figure]:
    """Upload a whole image over NBD; two sources in turn, so that each byte changes each time."""
    image, size = world.data("write.raw"), world.scale.image
    paths = [world.data(f"source{number}.raw") for number in range(2)]
    sources = [(str(path), digest(path, (0, size))) for path in paths]
    tools = {"curl": lambda source, target: ["curl", "-fsS", "-T", source, target]}
    tools |= _tools("upload")
    turns = count()

    def uploads(command: Command, url: str) -> Measure:
        def measure(_number: int) -> float:
            source, wanted = sources[next(turns) % 2]
            seconds = _seconds(command(source, url))
            expect(digest(image, (0, size)), wanted, url)
            return seconds

        return measure

    with (
        world.image_server("writers", max_writers=4) as server,
        _served(world, server, image, tools, "--discard=unmap") as urls,
    ):
        measures = {name: uploads(command, urls[name]) for name, command in tools.items()}
        rounds = Rounds.take(world.scale.rounds, **measures)
    work = f"imagectl upload {shown(size)} over NBD"
    return [_figure(work, rounds, n, who, size) for n in _CONNECTIONS for who in ("curl", "ovirt")]


def imagectl_sparse(world: World) -> list[Figure]:
    """Download a large image that is mostly one hole, and one of the same data without it."""
    size = world.scale.image // _PART // MIB * MIB
    sparse, full = spread(world, world.scale.sparse, size), world.data("full.raw", size)
    tools = _tools("download")
    plain = {f"full{n}": tools[f"imagectl{n}"] for n in _CONNECTIONS}
    with (
        _served(world, world.server, sparse, tools, "--read-only") as urls,
        _served(world, world.server, full, plain, "--read-only") as plain_urls,
    ):
        measures = {name: _downloads(world, tools[name], urls[name]) for name in tools}
        measures |= {name: _downloads(world, plain[name], plain_urls[name]) for name in plain}
        rounds = Rounds.take(world.scale.rounds, **measures)
    work = f"imagectl download {shown(world.scale.sparse)} with {shown(size)} of data"
    figures = [_figure(work, rounds, number, "ovirt", size) for number in _CONNECTIONS]
    for number in _CONNECTIONS:
        figure = _figure(work, rounds, number, "full", size)
        figure.against, figure.target = f"{shown(size)} without holes", 0.5
        figures.append(figure)
    return figures


def _tools(way: str) -> dict[str, Command]:
    compileall.compile_dir(ROOT / "imageserver", quiet=1)  # as pip does when it installs
    tools: dict[str, Command] = {}
    for number in _CONNECTIONS:
        ours = ["-m", "imageserver.client", way, "--quiet", f"--connections={number}"]
        if way == "upload":  # nobody else hashes; what it costs is a row of its own
            ours.append("--no-digests")
        tools[f"imagectl{number}"] = _command(ours)
        tools[f"ovirt{number}"] = _command(["-c", _OVIRT, way], str(number))
    return tools


def _command(before: list[str], *after: str) -> Command:
    return lambda source, target: [sys.executable, *before, source, target, *after]


@contextmanager
def _served(
    world: World, server: ImageServer, image: Path, names: Iterable[str], *options: str
) -> Iterator[dict[str, str]]:
    """Serve an image to each of these by a qemu-nbd of its own; yield the URLs."""
    with world.served(image, tuple(names), *options) as socks:
        origin = f"http://127.0.0.1:{server.port}"
        yield {name: origin + server.add_nbd(sock) for name, sock in socks.items()}


def _downloads(world: World, command: Command, url: str, wanted: str = "") -> Measure:
    copy = world.directory / "copy.raw"

    def measure(_number: int) -> float:
        try:
            seconds = _seconds(command(url, str(copy)))
            if wanted:
                expect(digest(copy, (0, copy.stat().st_size)), wanted, url)
        finally:
            copy.unlink(missing_ok=True)
        return seconds

    return measure


def _seconds(command: list[str]) -> float:
    return timed([program(command[0]), *command[1:]])[0]


def spread(world: World, size: int, data: int) -> Path:
    """Return a sparse image with so many bytes of data, in pieces all over it."""
    path = world.sparse("sparse.raw", size)
    with path.open("r+b") as file:
        for number in range(_PIECES):
            file.seek(number * (size // _PIECES))
            file.write(os.urandom(data // _PIECES))
    return path


def _figure(work: str, rounds: Rounds, connections: int, who: str, size: int) -> Figure:
    reference = who if who in rounds.values else f"{who}{connections}"
    name = reference.replace("ovirt", "ovirt_imageio.client, ")
    work = f"{work}, {connections} connection{'s'[connections == 1 :]}"
    return rounds.speed(work, name, size, 1.0, ours=f"imagectl{connections}", reference=reference)
