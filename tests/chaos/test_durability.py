# SPDX-License-Identifier: Apache-2.0
"""What has reached the disk when a client is told so, as the system calls show."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.chaos.world import Nbd
from tests.system.disks import sparse
from tests.system.harness import Server, listens, process, program, wait_until
from tests.system.skips import needs

SIZE = 1 << 20
JSON = {"Content-Type": "application/json"}
#: strace as a grandchild of what it traces, whose pid then is the command's own.
STRACE = ["strace", "-D", "-f", "-y", "-qq", "-s", "24", "-e"]
CALLS = "trace=fsync,fdatasync,linkat,rename,renameat,renameat2,sendmsg,sendto"

pytestmark = needs("ptrace")


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    traced = Server(workplace, workers=1)
    traced.command = [*STRACE, CALLS, "-o", str(workplace / "trace"), *traced.command]
    with traced:
        yield traced


def steps(trace: Path, since: int, patterns: dict[str, str]) -> list[str]:
    """Return which of the patterns' system calls were completed since, in order."""
    found = []
    for line in trace.read_text()[since:].splitlines():
        found += [name for name, pattern in patterns.items() if re.search(pattern, line)]
    return found


def answers(
    server: Server,
    method: str,
    path: str,
    body: bytes | None = None,
    fields: Mapping[str, str] | None = None,
) -> int:
    """Make a request; return where in the trace it began."""
    began = (server.directory / "trace").stat().st_size
    assert server.request(method, path, body, fields).status == 200
    wait_until(lambda: "200 OK" in (server.directory / "trace").read_text()[began:])
    return began


@pytest.mark.parametrize(
    ("fmt", "method", "tail", "body", "fields"),
    [
        ("opaque", "POST", "/flush", None, {}),
        ("raw", "POST", "/flush", None, {}),
        ("raw", "PATCH", "", b'{"op":"zero","size":4096,"flush":true}', JSON),
        ("raw", "PUT", "?flush=y", b"x", {"Content-Range": "bytes 5-5/*"}),
        ("raw", "PUT", "?flush=y", bytes(SIZE), {}),
    ],
)
def test_flush_of_a_file_syncs_its_data_and_its_directory_before_the_answer(
    server, workplace, home, fmt, method, tail, body, fields
):
    image = sparse(home / "image", SIZE)
    url = server.add("flushed", backend="file", file=str(image), format=fmt)
    began = answers(server, method, f"{url}{tail}", body, fields)
    assert steps(
        workplace / "trace",
        began,
        {
            "data": rf"f(data)?sync\(\d+<{image}>",
            "directory": rf"fsync\(\d+<{home}>",
            "answer": "200 OK",
        },
    ) == ["data", "directory", "answer"]


def test_put_of_a_file_syncs_the_new_file_before_it_is_renamed_and_the_directory_after(
    server, workplace, home
):
    image = sparse(home / "image", SIZE)
    url = server.add("replaced", backend="file", file=str(image))
    began = answers(server, "PUT", url, b"x" * SIZE)
    assert steps(
        workplace / "trace",
        began,
        {
            "data": rf"fsync\(\d+<{home}/.",
            "rename": r'rename\w*\(.*"',
            "directory": rf"fsync\(\d+<{home}>",
            "answer": "200 OK",
        },
    ) == ["data", "rename", "directory", "answer"]


@pytest.mark.parametrize(
    ("method", "tail", "body", "covers", "syncs"),
    [
        ("POST", "/flush", None, "image", True),
        ("PATCH", "", b'{"op":"flush"}', "image", True),
        ("PATCH", "", b'{"op":"zero","size":4096,"flush":true}', "image", True),
        ("PATCH", "", b'{"op":"zero","size":4096}', "image", False),
        ("PATCH", "", b'{"op":"zero","size":4096}', "connection", True),
        ("PUT", "", bytes(SIZE), "image", False),
        ("PUT", "", bytes(SIZE), "connection", True),
    ],
    ids=["POST flush", "PATCH flush", "zero with flush", "zero", "zero's own", "PUT", "PUT's own"],
)
def test_flush_of_an_export_makes_the_nbd_server_sync_its_image_before_the_answer(
    home, method, tail, body, covers, syncs
):
    """A qemu-nbd for one client has no multi-conn: the transfer says what a flush covers."""
    image = sparse(home / "image", SIZE)
    nbd = Nbd(image)
    trace = home / "trace"
    command = [*STRACE, "trace=fsync,fdatasync", "-o", str(trace), program("qemu-nbd")]
    command += ["--persistent", "--format=raw", f"--socket={nbd.socket}", str(image)]
    with process(command, lambda: listens(nbd.socket)), Server(home, workers=1) as server:
        url = server.add("disk", socket=str(nbd.socket), flush=covers)
        assert server.request("PUT", url, b"x" * SIZE).status == 200
        began = trace.stat().st_size
        assert server.request(method, url + tail, body, JSON if body else {}).status == 200
        # strace writes down what it stopped for before the process goes on.
        assert ("fdatasync(" in trace.read_text()[began:]) == syncs
