# SPDX-License-Identifier: Apache-2.0
"""Rows about qcow2 files that the server makes."""

from lab.processes import program
from lab.servers import qemu_img

from benchmark.figures import GIB, Figure, Rounds
from benchmark.verify import expect
from benchmark.watching import timed
from benchmark.world import World

_QCOW2 = "?format=qcow2"
#: Of what takes many seconds.
_SLOW_ROUNDS = 3
_RUN = 128 * 1024
"""Mean length of a run of data, and of a hole, in the image with many extents."""


def qcow2(world: World) -> list[Figure]:
    """Get an image as a qcow2 file, against the image itself; and wait for the first byte."""
    image, socks = world.readable
    size, port = world.scale.image, world.server.port
    url = f"http://127.0.0.1:{port}{world.server.add_nbd(socks['ours'])}"
    rounds = Rounds.take(
        world.scale.rounds, ours=lambda _: _get(url + _QCOW2), raw=lambda _: _get(url)
    )
    made = world.directory / "made.qcow2"
    try:
        _get(url + _QCOW2, str(made))
        compared = qemu_img("compare", "-U", "-f", "raw", "-F", "qcow2", image, made)
        expect(compared.strip(), "Images are identical.", "the qcow2 file")
    finally:
        made.unlink(missing_ok=True)
    return [
        rounds.speed(f"GET {size // GIB or 1} GiB over NBD as qcow2", "raw", size, 0.8),
        _first_byte(world),
    ]


def _first_byte(world: World) -> Figure:
    server, size = world.server, world.scale.mapped
    plugin = ["sparse-random", f"size={size}", f"runlength={_RUN}", "percent=50", "seed=1"]
    with world.nbdkit("made", *plugin) as sock:
        url = f"http://127.0.0.1:{server.port}{server.add_nbd(sock)}"
        rounds = Rounds.take(
            _SLOW_ROUNDS,
            extents=lambda _: _get(f"{url}/extents"),
            ours=lambda _: _get(url + _QCOW2, "/dev/null", "-r", "0-0"),
        )
    work = f"first byte of {size // GIB} GiB as qcow2"
    return rounds.less(Figure(work, "extents", [], 1.2), lambda s: f"{s:.2f} s", "extents")


def _get(url: str, target: str = "/dev/null", *options: str) -> float:
    return timed([program("curl"), "-sS", "--fail", "-o", target, *options, url])[0]
