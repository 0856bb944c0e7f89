# SPDX-License-Identifier: Apache-2.0
"""Rows of imagectl, against the clients that others use; a client's start counts as its time."""

import compileall
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import process
from figures import Figure, Measure, Rounds
from verify import digest, expect
from world import GIB, MIB, Server, World

_CONNECTIONS = (1, 4)
_PACKAGE = Path(__file__).resolve().parents[2] / "imageserver"
_IMAGECTL = [sys.executable, "-m", "imageserver.client"]
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
    image = world.data("read.raw", world.scale.image)
    tools = {"curl": lambda source, target: ["curl", "-fsS", "-o", target, source]}
    tools |= _tools("download")
    with _served(world, world.server, image, tools, "--read-only") as urls:
        wanted = digest(image, (0, world.scale.image))
        measures = {
            name: _downloads(world, command, urls[name], wanted) for name, command in tools.items()
        }
        rounds = Rounds.take(world.scale.rounds, **measures)
    work = f"imagectl download {_size(world.scale.image)} over NBD"
    return _figures(work, rounds, ("curl", "ovirt"), world.scale.image)


def imagectl_upload(world: World) -> list[Figure]:
    """Upload a whole image over NBD; two sources in turn, so that each byte changes each time."""
    size = world.scale.image
    image = world.data("write.raw", size)
    sources = [(path, digest(path, (0, size))) for path in _sources(world)]
    tools = {"curl": lambda source, target: ["curl", "-fsS", "-T", source, target]}
    tools |= _tools("upload")
    turns = count()

    def uploads(command: Command, url: str) -> Measure:
        def measure(_number: int) -> float:
            source, wanted = sources[next(turns) % 2]
            seconds = _seconds(command(str(source), url))
            expect(digest(image, (0, size)), wanted, url)
            return seconds

        return measure

    with (
        world.image_server("writers", settings={"max_writers": 4}) as server,
        _served(world, server, image, tools, "--discard=unmap") as urls,
    ):
        measures = {name: uploads(command, urls[name]) for name, command in tools.items()}
        rounds = Rounds.take(world.scale.rounds, **measures)
    return _figures(f"imagectl upload {_size(size)} over NBD", rounds, ("curl", "ovirt"), size)


def imagectl_sparse(world: World) -> list[Figure]:
    """Download a large image that is mostly one hole, and one of the same data without it."""
    size = world.scale.image // _PART // MIB * MIB
    sparse, full = _spread(world, world.scale.sparse, size), world.data("full.raw", size)
    tools = _tools("download")
    plain = {f"full{n}": tools[f"imagectl{n}"] for n in _CONNECTIONS}
    with (
        _served(world, world.server, sparse, tools, "--read-only") as urls,
        _served(world, world.server, full, plain, "--read-only") as plain_urls,
    ):
        measures = {name: _downloads(world, tools[name], urls[name]) for name in tools}
        measures |= {name: _downloads(world, plain[name], plain_urls[name]) for name in plain}
        rounds = Rounds.take(world.scale.rounds, **measures)
    work = f"imagectl download {_size(world.scale.sparse)} with {_size(size)} of data"
    figures = _figures(work, rounds, ("ovirt",), size)
    for connections in _CONNECTIONS:
        figure = _figure(work, rounds, connections, f"full{connections}", size)
        figure.against, figure.target = f"{_size(size)} without holes", 0.5
        figures.append(figure)
    return figures


def _tools(way: str) -> dict[str, Command]:
    tools: dict[str, Command] = {}
    compileall.compile_dir(_PACKAGE, quiet=1)  # as pip does when it installs
    for number in _CONNECTIONS:
        options = ["--quiet", f"--connections={number}"]
        tools[f"imagectl{number}"] = lambda source, target, options=options: [
            *_IMAGECTL,
            way,
            *options,
            source,
            target,
        ]
        tools[f"ovirt{number}"] = lambda source, target, number=number: [
            sys.executable,
            "-c",
            _OVIRT,
            way,
            source,
            target,
            str(number),
        ]
    return tools


@contextmanager
def _served(
    world: World, server: Server, image: Path, names: Sequence[str], *options: str
) -> Iterator[dict[str, str]]:
    """Serve an image to each of these by a qemu-nbd of its own; yield the URLs."""
    with ExitStack() as opened:
        socks = {
            name: opened.enter_context(world.qemu_nbd(image, *options, who=name)) for name in names
        }
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
    return process.run([process.program(command[0]), *command[1:]])[0]


def _sources(world: World) -> list[Path]:
    return [world.data(f"source{number}.raw", world.scale.image) for number in range(2)]


def _spread(world: World, size: int, data: int) -> Path:
    path = world.sparse("sparse.raw", size)
    with path.open("r+b") as file:
        for number in range(_PIECES):
            file.seek(number * (size // _PIECES))
            file.write(os.urandom(data // _PIECES))
    return path


def _figures(work: str, rounds: Rounds, against: Sequence[str], size: int) -> list[Figure]:
    return [
        _figure(work, rounds, number, name if name in rounds.values else f"{name}{number}", size)
        for number in _CONNECTIONS
        for name in against
    ]


def _figure(work: str, rounds: Rounds, connections: int, against: str, size: int) -> Figure:
    ours = f"imagectl{connections}"

    def speed(name: str) -> str:
        return f"{size / MIB / rounds.median(name):.0f} MiB/s"

    return Figure(
        f"{work}, {connections} connection{'s'[connections == 1 :]}",
        against.replace("ovirt", "ovirt_imageio.client, "),
        rounds.ratios(against, ours),
        1.0,
        ours=speed(ours),
        reference=speed(against),
    )


def _size(size: int) -> str:
    return f"{size // GIB} GiB" if size >= GIB else f"{size // MIB} MiB"
