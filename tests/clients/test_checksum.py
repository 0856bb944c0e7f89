# SPDX-License-Identifier: Apache-2.0
"""Checksums (docs/api.md), against oVirt's client and the programs that people have."""

import random
import socket
import subprocess
from pathlib import Path

import pytest
from ovirt_imageio import client
from ovirt_imageio._internal import blkhash

from tests.clients.ovirt import LEAVES_A_CONNECTION, collected  # noqa: F401 - fixture
from tests.system.disks import offered
from tests.system.harness import (
    Server,
    nbdkit,
    program,
    qemu_img,
    qemu_io,
    wait_until,
)

pytestmark = LEAVES_A_CONNECTION

MIB = 1 << 20
SIZE = 21 * MIB + 512
SETTINGS = {"workers": 2, "max_writers": 4}
PROGRAMS = {"whole-sha256": "sha256sum", "whole-sha512": "sha512sum", "whole-blake2b": "b2sum"}


def _of(server: Server, image: str, query: str = "") -> str:
    answer = server.request("GET", f"{image}/checksum{query}")
    assert answer.status == 200, answer.body
    checksum: str = answer.json["checksum"]
    return checksum


def _told_by(name: str, path: Path) -> str:
    command = [program(name), str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


@pytest.fixture(scope="module")
def images(workplace: Path) -> dict[str, Path]:
    """The same disk as qcow2 and raw: data, holes, zeros, in blocks that have each of them."""
    qcow2, raw = workplace / "disk.qcow2", workplace / "disk.raw"
    qemu_img("create", "-q", "-f", "qcow2", qcow2, SIZE)
    commands = ("write -P 1 0 5M", "write -z 1M 64k", "write -P 2 6M 64k", "write -P 3 16M 4M")
    qemu_io(qcow2, "qcow2", *commands, f"write -P 9 {SIZE - 512} 512")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", qcow2, raw)
    return {"qcow2": qcow2, "raw": raw}


@pytest.mark.parametrize(
    ("kind", "fmt", "options"),
    [
        ("nbd", "qcow2", ()),
        ("nbd", "qcow2", ("--shared=1",)),
        ("nbd", "raw", ()),
        ("nbd", "raw", ("--shared=1",)),
        ("raw", "raw", ()),
    ],
)
def test_a_disk_has_the_checksums_of_ovirt_and_of_programs(
    server: Server, images: dict[str, Path], kind: str, fmt: str, options: tuple[str, ...]
) -> None:
    theirs = [
        client.checksum(str(images[fmt])),
        client.checksum(str(images[fmt]), block_size=MIB + 4096, algorithm="blake2b"),
    ]
    with offered(server, kind, "disk", images[fmt], *options, fmt=fmt) as image:
        ours = [
            server.request("GET", f"{image}/checksum{query}").json
            for query in ("", f"?block_size={MIB + 4096}")
        ]
        whole = {name: _of(server, image, f"?algorithm={name}") for name in PROGRAMS}
    assert ours == theirs
    assert whole == {name: _told_by(told, images["raw"]) for name, told in PROGRAMS.items()}


@pytest.mark.parametrize("size", [0, 1, 4 * MIB, 4 * MIB + 77])
def test_a_file_of_any_size_has_the_checksums_of_ovirt_and_of_programs(
    server: Server, home: Path, size: int
) -> None:
    path = home / "file"
    path.write_bytes(random.Random(size).randbytes(size))  # noqa: S311 - repeatable
    image = server.add("file", backend="file", file=str(path))

    for algorithm, digest_size in (("blake2b", 32), ("sha1", None)):
        theirs = blkhash.checksum(path, algorithm=algorithm, digest_size=digest_size)
        ours = server.request("GET", f"{image}/checksum?algorithm={algorithm}").json
        assert ours == theirs
    assert _of(server, image, "?algorithm=whole-sha256") == _told_by("sha256sum", path)


def test_holes_are_not_read(server: Server, home: Path) -> None:
    log = home / "log"
    data = "@0x1000000 1*65536 @0x2000000 2*131072"
    filters = ("--filter=log", "data", f"data={data}", f"logfile={log}", "size=1T")
    with nbdkit(home / "sparse.sock", *filters) as sock:
        image = server.add("sparse", socket=str(sock))
        _of(server, image, "?length=1099511627776")
        wait_until(lambda: server.holders() == [])
    reads = [line for line in log.read_text().splitlines() if " Read " in line and "offset" in line]
    found = {word for line in reads for word in line.split() if word.startswith("offset=")}
    assert found == {"offset=0x1000000", "offset=0x2000000"}


#: Its data takes 20 s to be read.
_SLOW = ("--filter=delay", "data", "data=1", "size=1G", "rdelay=20")


def test_nobody_writes_meanwhile_and_a_client_that_leaves_ends_it(
    server: Server, home: Path
) -> None:
    with nbdkit(home / "slow.sock", *_SLOW) as sock:
        image = server.add("slow", socket=str(sock))
        zero = b'{"op":"zero","size":65536}'
        fields = {"Content-Type": "application/json"}
        with server.raw(_head(image)) as asking:
            wait_until(server.holders)
            refused = server.request("PATCH", image, headers=fields, body=zero)
            assert refused.refusal == (409, "image busy")
            assert asking.recv(1, socket.MSG_PEEK)  # the head, before the answer is there
        wait_until(lambda: server.holders() == [], 3)
        assert server.request("PATCH", image, headers=fields, body=zero).status == 200


def _head(image: str) -> bytes:
    return f"GET {image}/checksum HTTP/1.1\r\nHost: x\r\n\r\n".encode()
