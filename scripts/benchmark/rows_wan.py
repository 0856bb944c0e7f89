# SPDX-License-Identifier: Apache-2.0
"""A row of imagectl over a long way: how many connections it should take."""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from lab.processes import LabFailed, wait_until
from lab.wan import HERE, THERE, Link

from benchmark.figures import MIB, Figure, Measure, Rounds
from benchmark.world import ImageServer, World

_ROUND_TRIPS = (0.02, 0.08)
_LOSSES = (0.0, 0.01)
#: Bytes per second: 256 Mbit/s, half of what the relay can do beside server and client.
_RATE = 32e6
_COUNTS = ("1", "2", "4", "8", "16")
_MOST = 16
_DEFAULT = "default"


def wan(world: World) -> list[Figure]:
    """Imagectl's transfers with 1 to 16 connections, by round trip and loss."""
    figures = []
    for round_trip in _ROUND_TRIPS:
        for loss in _LOSSES:
            where = f"{round_trip * 1000:.0f} ms, {loss:.0%} lost"
            link = Link(round_trip / 2, loss, _RATE)
            with link.running() as inside, world.room("wan") as directory:
                server = world.prepared(directory, max_readers=_MOST, max_writers=_MOST)
                server.command = [*inside, *server.command]
                server.env["IMAGESERVER_BIND"] = f"{HERE}:{server.port}"
                with server:
                    figures += _both(world, server, inside, where)
    return figures


def _both(world: World, server: ImageServer, inside: list[str], where: str) -> list[Figure]:
    image = world.data("wan.raw", world.scale.far)
    target = world.sparse("wan-target.raw", world.scale.far)
    copies = world.directory / "wan-copies"
    figures = []
    with (
        world.serving(image, "--read-only") as source,
        world.serving(target, "--discard=unmap") as sink,
    ):
        urls = [f"http://{THERE}:{server.port}{server.add_nbd(sock)}" for sock in (source, sink)]

        def measure(count: str, *words: object) -> Measure:
            options = ["--quiet"] + ([] if count == _DEFAULT else [f"--connections={count}"])
            command = [*inside, sys.executable, "-m", "imageserver.client", *map(str, words)]

            def measured(_number: int) -> float:
                wait_until(lambda: not server.holders(), 60)  # of the client before
                shutil.rmtree(copies, ignore_errors=True)
                copies.mkdir()
                with target.open("r+b") as file:
                    file.truncate(0)
                    file.truncate(world.scale.far)
                return _rate(world, command + options, (target, copies))

            return measured

        for way, words in (
            ("download", [urls[0], copies / "copy.raw"]),
            ("upload", [image, urls[1]]),
        ):
            tried = {count: measure(count, way, *words) for count in (*_COUNTS, _DEFAULT)}
            figures += _figures(Rounds.take(1, **tried), f"imagectl {way}, {where}")
    return figures


def _rate(world: World, command: list[str], places: Iterable[Path]) -> float:
    """Return bytes per second: of all, or of what has arrived when it is cut off."""
    began = time.monotonic()
    with subprocess.Popen(command) as running:
        try:
            if running.wait(world.scale.patience):
                raise subprocess.CalledProcessError(running.returncode, command)
        except subprocess.TimeoutExpired:
            if arrived := _arrived(places):
                return arrived / (time.monotonic() - began)
            raise LabFailed(f"nothing arrived in {world.scale.patience:g} s") from None
        finally:
            running.kill()
    return world.scale.far / (time.monotonic() - began)


def _arrived(places: Iterable[Path]) -> int:
    found = 0
    for place in places:
        for path in place.iterdir() if place.is_dir() else [place]:
            with contextlib.suppress(FileNotFoundError):  # it is being renamed
                found += path.stat().st_blocks * 512
    return found


def _figures(rounds: Rounds, work: str) -> list[Figure]:
    def text(rate: float) -> str:
        return f"{rate / MIB:.1f} MiB/s"

    figures = [
        rounds.compare(Figure(f"{work}, {count} connections", "1", []), text, count, "1")
        for count in _COUNTS[1:]
    ]
    best = max(_COUNTS, key=lambda count: rounds.values[count])
    figure = Figure(f"{work}, as many as it takes", f"the best, {best}", [])
    return [*figures, rounds.compare(figure, text, _DEFAULT, best)]
