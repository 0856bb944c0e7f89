# SPDX-License-Identifier: Apache-2.0
"""imagectl top (docs/imagectl.md): what runs, shown once, as JSON and on a terminal."""

import contextlib
import json
import os
import pty
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import reading
from tests.system.harness import Server, free_port, wait_until
from tests.system.moving import IMAGECTL, finish, imagectl, running
from tests.system.watching import Admin, short, watched


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin, unix: Admin, big: dict[str, str]) -> Iterator[Server]:
    with watched(workplace, big, tcp, unix) as running_server:
        yield running_server


@pytest.fixture
def url(server: Server, tcp: Admin) -> str:
    """Where the admin listener is."""
    return f"http://{tcp.bind}"


def test_top_shows_what_runs_over_all_workers(server, tcp, unix, url, big, name):
    server.add(name, **big)
    with reading(server, f"/images/{name}"):
        found = json.loads(imagectl("top", "--once", "--json", url).stdout)
        transfer = found["transfers"][0]
        same = ("id", "operation", "client", "worker", "expected")
        told = tcp.transfers()[0]
        assert {key: transfer[key] for key in same} == {key: told[key] for key in same}
        assert {worker["worker"] for worker in found["workers"]} == set(server.worker_pids())
        shown = imagectl("top", "--once", unix.bind).stdout
        assert re.search(rf"^{name[:11]}. +read +127.0.0.1 ", shown, re.MULTILINE)
        assert short(name) in imagectl("top", "--once", url).stdout


def test_top_asked_of_another_listener_is_one_sentence(server):
    errors = imagectl("top", f"http://127.0.0.1:{server.port}", status=3).stderr
    assert (errors.count("\n"), "not found" in errors) == (1, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_top_ends_with_a_signal_and_has_shown_each_poll(url, number):
    with running("top", "--interval", 0.1, "--json", url) as started:
        lines = [json.loads(started.stdout.readline()) for _ in range(3)]
        started.send_signal(number)
        assert finish(started) == ""
    assert [len(line["workers"]) for line in lines] == [3, 3, 3]


class Screen:
    """A terminal on which a command runs."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            env = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "24"}
            command = [*IMAGECTL, *map(str, arguments)]
            os.execve(command[0], command, env)  # noqa: S606 - beside pytest, no shell
        self.seen = ""

    def shows(self, text: str) -> bool:
        """Tell whether a text has come since the last call that found its own."""
        with contextlib.suppress(OSError):
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        _, found, after = self.seen.partition(text)
        self.seen = after if found else self.seen
        return bool(found)

    def ends(self) -> int:
        while True:
            try:
                if not os.read(self.fd, 65536):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextlib.contextmanager
def screen(*arguments: object) -> Iterator[Screen]:
    shown = Screen(*arguments)
    try:
        yield shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(shown.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(shown.pid, 0)
        os.close(shown.fd)


@pytest.mark.filterwarnings("ignore:.*forkpty:DeprecationWarning")
def test_top_goes_on_when_the_server_goes_away_and_comes_back(home):
    port = free_port()
    server = Server(home, workers=1, admin_bind=f"127.0.0.1:{port}")
    with server, screen("top", "--interval", 0.1, f"http://127.0.0.1:{port}") as shown:
        wait_until(lambda: shown.shows("1 accepting"))
        server.stop()
        wait_until(lambda: shown.shows("Connection refused; trying again"))
        server.start()
        wait_until(lambda: shown.shows("1 accepting"))
        os.write(shown.fd, b"q")
        assert shown.ends() == 0
