# SPDX-License-Identifier: Apache-2.0
"""A real haproxy with conf/haproxy.cfg as it is shipped, and hosts for it to find.

Imports nothing of the package. The file is told by its environment variables where to listen
and where its two hosts are; nothing in it is changed.
"""

import contextlib
import csv
import os
import signal
import socket
import socketserver
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.system.harness import ROOT, Server, program, wait_until
from tests.system.threads import serving

CONFIG = ROOT / "conf" / "haproxy.cfg"
HOSTS = ("kvm1", "kvm2")
BIG = 64 << 20  # more than all socket buffers on the way hold


class Balancer(Server):
    """A running haproxy before two ports of loopback; ``map_text``: its map at start."""

    def __init__(self, directory: Path, *ports: int, routing: str, map_text: str = "") -> None:
        directory.mkdir(exist_ok=True)
        super().__init__(directory)
        self.map = directory / "haproxy.map"
        self.map.write_text(map_text)
        self.admin_path = directory / "admin.sock"
        self.env |= {
            "LB_BIND": f"127.0.0.1:{self.port}",
            "LB_ADMIN": str(self.admin_path),
            "LB_MAP": str(self.map),
            "LB_ROUTING": routing,
        }
        self.env |= {
            f"LB_{name.upper()}": f"127.0.0.1:{port}"
            for name, port in zip(HOSTS, ports, strict=True)
        }
        if os.geteuid():
            self.env["LB_UNPRIVILEGED"] = "1"
        self.workers = len(HOSTS)
        self.command = [program("haproxy"), "-f", str(CONFIG)]

    def _accepting(self, _before: int) -> int:
        """Count the hosts that have answered a probe; haproxy takes others to be up, at first."""
        with contextlib.suppress(OSError):
            return sum(host["check_status"] == "L7OK" for host in self.hosts().values())
        return 0

    def admin(self, command: str) -> str:
        """Say something to the admin socket; return the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.admin_path))
            sock.sendall(command.encode() + b"\n")
            with sock.makefile() as answer:
                return answer.read().strip()

    def hosts(self) -> dict[str, dict[str, str]]:
        """Return what haproxy knows of each host, by name."""
        lines = self.admin("show stat hosts 4 -1").removeprefix("# ").splitlines()
        return {row["svname"]: row for row in csv.DictReader(lines)}

    def status(self, host: str) -> str:
        return self.hosts()[host]["status"]

    def route(self, name: str, host: str) -> None:
        assert self.admin(f"add map {self.map} {name} {host}") == ""


@contextlib.contextmanager
def in_state(balancer: Balancer, host: str, state: str) -> Iterator[None]:
    """Put a host into a state (drain, maint) for a block."""
    assert balancer.admin(f"set server hosts/{host} state {state}") == ""
    try:
        yield
    finally:
        assert balancer.admin(f"set server hosts/{host} state ready") == ""
        wait_until(lambda: balancer.status(host) == "UP")


def check(**env: str) -> subprocess.CompletedProcess[str]:
    """Let haproxy check the file, with nothing set but ``env``."""
    clean = {name: text for name, text in os.environ.items() if not name.startswith("LB_")}
    command = [program("haproxy"), "-c", "-V", "-f", str(CONFIG.relative_to(ROOT))]
    return subprocess.run(
        command, cwd=ROOT, env=clean | env, capture_output=True, text=True, check=False
    )


@contextlib.contextmanager
def two_hosts(workplace: Path, *small: str) -> Iterator[list[Server]]:
    """Run two servers that know the same images, each its own: the first bytes say whose.

    ``small`` names images that are no more than that; ``big`` is one of ``BIG`` bytes.
    """
    with contextlib.ExitStack() as stack:
        running = []
        for host in HOSTS:
            home = workplace / host
            home.mkdir(exist_ok=True)
            server = stack.enter_context(Server(home, workers=2))
            (home / "small").write_text(host)
            with (home / "big").open("wb") as file:
                file.write(host.encode())
                file.truncate(BIG)
            for name in small:
                server.add(name, backend="file", file=str(home / "small"))
            server.add("big", backend="file", file=str(home / "big"))
            running.append(server)
        yield running


def owner(balancer: Balancer, name: str) -> str:
    """Return which host answers for an image."""
    answer = balancer.request("GET", f"/images/{name}", headers={"Range": "bytes=0-3"})
    assert answer.status == 206
    return answer.body.decode()


def kill(server: Server) -> None:
    """End a server as a power cut would: every process of it at once."""
    assert server.process is not None
    pids = [server.process.pid, *server.worker_pids()]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    server.process.wait()


class Received(NamedTuple):
    """A request as it reached a host: its line, its header fields, how much of a body."""

    line: str
    fields: dict[str, str]
    body: int


class Recorder(socketserver.ThreadingTCPServer):
    """A host that answers probes and hangs up on everything else, once it has all of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Recording)
        self.port: int = self.server_address[1]
        self.received: list[Received] = []

    def of(self, method: str) -> list[Received]:
        return [request for request in self.received if request.line.startswith(f"{method} ")]


class _Recording(socketserver.StreamRequestHandler):
    """One connection to the recorder, one request."""

    server: Recorder

    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()
        fields = {}
        while text := self.rfile.readline().decode().strip():
            name, _, value = text.partition(":")
            fields[name.lower()] = value.strip()
        body = len(self.rfile.read(int(fields.get("content-length", 0))))
        self.server.received.append(Received(line, fields, body))
        if line.startswith("OPTIONS "):
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    recorder = Recorder()
    with serving(recorder):
        yield recorder
