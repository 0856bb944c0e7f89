# SPDX-License-Identifier: Apache-2.0
"""Sockets from systemd: the same as the settings' addresses, and numbered for a successor."""

import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imageserver.server import activation

#: Runs in a process of its own, whose descriptors from 3 up are the sockets.
_CHECK = """
import os, sys
from imageserver.server import activation
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = sys.argv[1]
assert activation.is_activated()
try:
    activation.check(eval(sys.argv[2]))
except activation.WrongSockets as exc:
    print(exc)
"""

_HAND_ON = """
import os, socket, sys
from imageserver.server import activation
count = int(sys.argv[1])
sockets = [socket.socket(fileno=fd) for fd in range(3, 3 + count)]
moved = [socket.socket(fileno=os.dup(sock.fileno())) for sock in reversed(sockets)][::-1]
[sock.detach() for sock in sockets]
[os.close(fd) for fd in range(3, 3 + count)]
for sock in moved:
    os.set_inheritable(sock.fileno(), True)
activation.pass_on(moved)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[2]])
"""

_LIST = """
import os, socket
for fd in sorted(int(fd) for fd in os.listdir("/proc/self/fd")):
    try:
        print(fd, repr(socket.socket(fileno=fd).getsockname()))
    except OSError:
        pass
"""


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """Three listeners: TCP, a path, an abstract name."""
    with (
        socket.socket(socket.AF_INET) as tcp,
        socket.socket(socket.AF_UNIX) as path,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        tcp.bind(("127.0.0.1", 0))
        path.bind(f"{tmp_path}/s")
        abstract.bind(f"\0{tmp_path}")
        yield [tcp, path, abstract]


def _run(sockets: list[socket.socket], code: str, *arguments: str) -> str:
    """Run code with the sockets as descriptors 3 and up, and no other."""
    fds = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 3 + len(sockets)) for sock in sockets]
    moves = "".join(f" {number}<&{fd} {fd}<&-" for number, fd in enumerate(fds, 3))
    command = ["bash", "-c", f'exec "$@"{moves}', "bash", sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(
            command, pass_fds=fds, check=True, capture_output=True, text=True, timeout=30
        )
    finally:
        for fd in fds:
            os.close(fd)
    return done.stdout


def test_a_process_that_was_passed_none_is_not_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert not activation.is_activated()

    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert not activation.is_activated()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        pytest.param(("127.0.0.1", 80), "127.0.0.1:80", id="tcp"),
        pytest.param(("::1", 80, 0, 0), "[::1]:80", id="tcp6"),
        pytest.param("/run/s", "unix:/run/s", id="path"),
        pytest.param("\0name", "unix:@name", id="abstract"),
        pytest.param(b"\0name", "unix:@name", id="abstract-of-a-socket"),
    ],
)
def test_addresses_are_written_as_settings_are(address: object, text: str) -> None:
    assert activation._text(address) == text


def test_sockets_that_are_the_settings_addresses_pass(
    sockets: list[socket.socket], tmp_path: Path
) -> None:
    addresses = [f"\0{tmp_path}", f"{tmp_path}/s", sockets[0].getsockname()]

    assert _run(sockets, _CHECK, "3", repr(addresses)) == ""


def test_another_set_of_sockets_is_refused_with_both_named(
    sockets: list[socket.socket], tmp_path: Path
) -> None:
    said = _run(sockets, _CHECK, "2", repr([f"{tmp_path}/s", ("localhost", 1)]))

    port = sockets[0].getsockname()[1]
    assert said == (
        f"systemd has passed 127.0.0.1:{port}, unix:{tmp_path}/s, but the settings name "
        f"localhost:1, unix:{tmp_path}/s; "
        "make ListenStream= of imageserver.socket and the settings agree\n"
    )


def test_a_successor_finds_the_sockets_where_it_looks_and_nowhere_else(
    sockets: list[socket.socket],
) -> None:
    found = _run(sockets, _HAND_ON, "3", _LIST)

    names = [sock.getsockname() for sock in sockets]
    assert found.splitlines() == [f"{fd} {name!r}" for fd, name in enumerate(names, 3)]
