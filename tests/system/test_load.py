# SPDX-License-Identifier: Apache-2.0
"""The load test passes on a server that does as it should, and fails where something is wrong."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from loading.report import REQUESTS

from tests.system.harness import ROOT, Server, free_port, qemu_nbd, repeatable, wait_until

SIZE = 4 << 20
WRONG = 3 << 20
LOCUSTFILE = ROOT / "scripts" / "locustfile.py"


def run(*arguments: object, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("IMAGESERVER_", "LOAD_"))}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=kept | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=100,
        check=False,
    )


# scripts/load


def load(temporary: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    path = str(ROOT / "scripts")
    environ |= {"PYTHONPATH": path, "TMPDIR": str(temporary)}
    return run("loading", *arguments, environ=environ)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory with a short name: a Unix socket's path ends at 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="is-") as name:
        yield Path(name)


def test_twenty_seconds_of_all_users_bring_nothing_unexpected(temporary: Path):
    report = temporary / "report.html"
    done = load(temporary, "20", "--html", str(report))
    assert done.returncode == 0, done.stdout
    rows = [re.split(r"  +", line) for line in done.stdout.splitlines() if "  " in line]
    failed = rows[0].index("failed")
    assert {row[failed] for row in rows[1:-1]} == {"0"}, done.stdout
    made = {(user, name) for user, names in REQUESTS.items() for name in names}
    assert {(row[0], row[1]) for row in rows[1:-1]} == made
    done_by = dict.fromkeys(REQUESTS, 0)
    for row in rows[1:-1]:
        done_by[row[0]] += int(row[2])
    assert min(done_by.values()) > 10, done.stdout
    assert sum(int(row[3]) for row in rows[1:-1]) > 0, "no limit was ever met"
    assert "<title>Locust" in report.read_text()
    report.unlink()
    assert list(temporary.iterdir()) == []


def test_a_server_that_cannot_serve_its_images_fails_the_load_test(temporary: Path):
    done = load(temporary, "1", IMAGESERVER_FILE_ROOTS="/nowhere")
    assert done.returncode == 1, done.stdout
    assert done.stdout.endswith("FAILED\n")
    assert list(temporary.iterdir()) == []


WRONG_ARGUMENTS = {
    "no user": (["--users", "0"], "--users: '0' is not a number of users from 9 to 1000"),
    "too few": (["--users", "8"], "--users: '8' is not a number of users from 9 to 1000"),
    "no time": (["0"], "seconds: '0' is not a number of seconds from 1 to 604800"),
    "a part of a second": (["0.5"], "seconds: '0.5' is not a number of seconds from 1 to 604800"),
    "years": (["1e9"], "seconds: '1e9' is not a number of seconds from 1 to 604800"),
    "no directory": (["--html", "none/x"], "--html: 'none/x' is not a file that can be written"),
    "a directory": (["--html", "."], "--html: '.' is not a file that can be written"),
}


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_a_wrong_argument_is_one_sentence_before_anything_is_started(temporary: Path, name: str):
    arguments, sentence = WRONG_ARGUMENTS[name]
    done = load(temporary, *arguments)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == f"scripts/load: error: argument {sentence}"
    assert list(temporary.iterdir()) == []


# The locustfile, against a server that is there


class World:
    """A server with a read slot and a write slot, a file and an export of the same content."""

    def __init__(self, home: Path, server: Server, sock: Path) -> None:
        self.home = home
        self.server = server
        self.content = home / "content"
        server.add("file", backend="file", file=str(self.content))
        server.add("nbd", socket=str(sock))

    def locust(self, *options: str) -> tuple[int, str]:
        command = ["locust", "-f", LOCUSTFILE, "--headless", "--loglevel=WARNING", "-u6", "-r6"]
        figures = f"--json-file={self.home / 'figures'}"
        host = f"--host=http://127.0.0.1:{self.server.port}"
        done = run(*command, "-t1s", figures, host, *options, environ={"HOME": str(self.home)})
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def world(workplace: Path) -> Iterator[World]:
    content = workplace / "content"
    content.write_bytes(repeatable("load").randbytes(SIZE))
    settings = {"workers": 2, "max_readers": 1}
    with qemu_nbd(content) as sock, Server(workplace, **settings) as server:
        yield World(workplace, server, sock)


@contextlib.contextmanager
def held(world: World, head: str, what: str) -> Iterator[None]:
    """Hold what a request takes, by a client that does not go on."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", world.server.port))
        sock.sendall(f"{head}\r\nHost: x\r\n\r\n".encode())
        wait_until(lambda: world.server.holders() == [what])
        yield
    wait_until(lambda: world.server.holders() == [])


def test_right_bytes_and_limits_that_the_users_meet_themselves_pass(world: World):
    status, said = world.locust("-t2s", f"--read=file={world.content} nbd={world.content}")
    assert status == 0, said


def test_one_wrong_byte_fails(world: World):
    wrong = bytearray(world.content.read_bytes())
    wrong[WRONG] ^= 1
    path = world.home / "wrong"
    path.write_bytes(wrong)
    status, said = world.locust(f"--read=nbd={path}")
    assert (status, f"wrong from byte {WRONG} on" in said) == (1, True), said


def test_slots_that_nobody_of_the_run_has_fail(world: World):
    with held(world, "GET /images/nbd HTTP/1.1", "READ nbd"):
        status, said = world.locust(f"--read=nbd={world.content}")
    assert (status, "503 too many parallel reads: no limit explains it" in said) == (1, True), said


def test_a_lock_that_nobody_of_the_run_has_fails(world: World):
    head = f"PUT /images/nbd HTTP/1.1\r\nContent-Length: {SIZE}"
    with held(world, head, "WRITE nbd"):
        status, said = world.locust(f"--read=nbd={world.content}")
    assert (status, "409 image busy: no limit explains it" in said) == (1, True), said


def test_transfers_that_are_not_known_at_once_fail(world: World):
    elsewhere = world.home / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "nbd").write_bytes((world.server.config / "nbd").read_bytes())
    status, said = world.locust(f"--read=nbd={world.content}", f"--config-dir={elsewhere}")
    assert (status, "OPTIONS new: 404 unknown image_id" in said) == (1, True), said


def test_an_image_that_is_not_there_fails_before_anything_is_done(world: World):
    status, said = world.locust("--read=nothing")
    assert status == 1, said
    assert "locustfile: OPTIONS /images/nothing: 404 unknown image_id\n" in said


def test_a_server_that_is_not_there_fails(world: World):
    status, said = world.locust(f"--host=http://127.0.0.1:{free_port()}")
    assert status == 1, said
    assert said.startswith("locustfile: OPTIONS /images/*: ConnectionRefusedError: "), said
