# SPDX-License-Identifier: Apache-2.0
"""imagectl on narrow and dumb terminals, and while a server says nothing."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Server, qemu_nbd
from tests.system.moving import IMAGECTL, MIB, filled, finish, imagectl, offer, running


@pytest.fixture
def image(server: Server, home: Path) -> Iterator[str]:
    with qemu_nbd(filled(home / "disk.raw", 8 * MIB, (0, 2 * MIB))) as sock:
        yield offer(server, sock)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Listens, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def name_of(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def on_terminal(columns: int, *arguments: object, term: str = "xterm") -> str:
    """Run imagectl on a terminal; return all that it writes there."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = os.environ | {"TERM": term, "LC_ALL": "C.UTF-8", "COLUMNS": str(columns)}
    command = [*IMAGECTL, *map(str, arguments)]
    with open(ours, "rb", buffering=0) as reader:
        with open(theirs, "wb", buffering=0) as terminal:
            started = subprocess.Popen(
                command, stdin=terminal, stdout=terminal, stderr=terminal, env=environ
            )
        said = b""
        with contextlib.suppress(OSError):  # all of the other side is closed
            while piece := reader.read(65536):
                said += piece
        assert started.wait(30) == 0, said
    return said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (
            ["map", "--rows", 1],
            [
                "8 MiB (8388608 bytes), 2 extents",
                "",
                "      0 B ████············",
                "",
                "          one character is 512 KiB",
                "",
                "█  data  2 MiB  25.0 %",
                "·  zero  6 MiB  75.0 %",
            ],
        ),
        (
            ["info"],
            [
                "size         8 MiB (8388608 bytes)",
                "features     checksum, digest,",
                "             extents, flush, qcow2,",
                "             zero",
                "methods      GET, HEAD, OPTIONS,",
                "             PATCH, PUT",
                "readers      up to 8",
                "writers      up to 1",
                "Unix socket  none",
            ],
        ),
    ],
    ids=["map", "info"],
)
def test_a_narrow_terminal_wraps_nothing(image, command, lines):
    said = on_terminal(36, *command, image)

    assert re.sub(r"\x1b\[[0-9;]*m", "", said).splitlines() == lines


def test_a_dumb_terminal_gets_plain_lines(image, home):
    copy = home / "copy.raw"
    said = on_terminal(80, "download", image, copy, term="dumb")

    assert said.splitlines()[0].startswith(f"{copy}: 8 MiB, of which 2 MiB data; ")
    assert said.count("\n") == 1


def test_a_server_without_tls_is_told_from_one_that_is_silent(silent):
    times = ("--timeout", 0.5, "--patience", 0)
    urls = [f"{scheme}://{name_of(silent)}/x" for scheme in ("https", "http")]
    said = [imagectl("info", url, *times, status=1).stderr for url in urls]

    assert said == [
        f"imagectl: {name_of(silent)} does not answer in TLS\n",
        f"imagectl: {name_of(silent)} was silent for too long\n",
    ]


def test_who_waits_for_long_is_told_why_unless_quiet(silent):
    name = name_of(silent)
    words = ("check", f"http://{name}/x", "--timeout", 3, "--patience", 9)
    with running(*words) as told, running(*words, "--quiet") as quiet:
        connections = [silent.accept()[0] for _ in range(2)]
        silent.close()
        ends = [finish(each, status=1) for each in (told, quiet)]
        for connection in connections:
            connection.close()

    gone = f"imagectl: cannot connect to {name}: Connection refused\n"
    assert ends == [
        f"imagectl: {name} was silent for too long; trying again for 9 s\n{gone}",
        gone,
    ]


def test_an_interruption_is_one_sentence(silent):
    with running("info", f"http://{name_of(silent)}/x") as started, silent.accept()[0]:
        started.send_signal(signal.SIGINT)
        assert finish(started, status=130) == "imagectl: interrupted.\n"
