# SPDX-License-Identifier: Apache-2.0
"""The one larger read by which a worker opens an NBD server that is new to it."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.system.harness import Server, nbdkit

MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with Server(workplace, workers=1) as running:
        yield running


def _reads(log: Path) -> list[tuple[int, int]]:
    """Return offset and length of every read that nbdkit was asked for, and begin anew.

    What a client wants, at most 1 MiB, is read in pieces, in any order: those are one read here.
    """
    found = re.findall(r" Read id=\d+ offset=0x([0-9a-f]+) count=0x([0-9a-f]+)", log.read_text())
    log.write_text("")
    told = [(int(offset, 16), int(count, 16)) for offset, count in found]
    pieces = sorted(read for read in told if read[1] <= MIB)
    assert all(sum(one) == other[0] for one, other in pairwise(pieces)), told
    wanted = [(pieces[0][0], sum(count for _, count in pieces))] if pieces else []
    return [read for read in told if read[1] > MIB] + wanted


def _get(server: Server, path: str, start: int, length: int) -> bytes:
    answer = server.request("GET", path, headers={"Range": f"bytes={start}-{start + length - 1}"})
    assert answer.status == 206, answer.body
    return answer.body


def test_each_server_is_opened_once_and_near_what_is_wanted(server: Server, workplace: Path):
    log, sock = workplace / "log", workplace / "opened"
    options = ("--filter=log", "pattern", str(SIZE), f"logfile={log}")
    path = server.add("opened", socket=str(sock))
    with nbdkit(sock, *options):
        assert len(_get(server, path, 3 * MIB, MIB)) == MIB
        assert _reads(log) == [(3 * MIB, 2 * MIB), (3 * MIB, MIB)]
        assert len(_get(server, path, 0, MIB)) == MIB
        assert _reads(log) == [(0, MIB)]
    with nbdkit(sock, *options):
        assert len(_get(server, path, SIZE - MIB, MIB)) == MIB
        assert _reads(log) == [(SIZE - 2 * MIB, 2 * MIB), (SIZE - MIB, MIB)]


def test_a_warm_up_that_fails_does_not_fail_the_transfer(server: Server, workplace: Path):
    pread = "pread=if [ $3 -gt 1048576 ]; then echo EIO bad >&2; exit 1; fi; head -c $3 /dev/zero"
    options = ("eval", f"get_size=echo {SIZE}", pread)
    with nbdkit(workplace / "bad", *options) as sock:
        assert _get(server, server.add("bad", socket=str(sock)), 0, MIB) == bytes(MIB)
