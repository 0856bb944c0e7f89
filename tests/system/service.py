# SPDX-License-Identifier: Apache-2.0
"""The service of a booted machine, to those who use it and those who look after it."""

import contextlib
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos.world import rest_of
from tests.system.booted import Machine
from tests.system.clients import putting, read_answer, reading
from tests.system.harness import ROOT, Server, wait_until

UNIT = "imageserver.service"
INSTALL = ROOT / "scripts" / "install"
#: Fetched by scripts/setup, as ``scripts/install --download`` does for a machine without network.
WHEELS = ROOT / ".venv" / "wheels"
ACTIVE = ("active", "running", "success")


class Service(Server):
    """The installed service, to those who use it."""

    def __init__(self, directory: Path, machine: Machine) -> None:
        super().__init__(directory)
        self.machine = machine
        self.config = machine.path("/run/imagetransfer")

    def add(self, name: str, **fields: object) -> str:
        """Write a transfer as root does: with mode 0640, in a directory that gives its group."""
        temporary = self.config / f".{name}.new"
        temporary.write_text(json.dumps(fields))
        temporary.chmod(0o640)
        temporary.rename(self.config / name)
        return f"/images/{name}"

    @property
    def state(self) -> tuple[str, ...]:
        names = ("ActiveState", "SubState", "Result")
        return tuple(self.machine.show(UNIT, name) for name in names)

    @property
    def main_pid(self) -> int:
        return int(self.machine.show(UNIT, "MainPID"))

    def signal(self, pid: int, number: signal.Signals) -> None:
        self.machine.run("kill", f"-{number.value}", pid)

    def accepting(self) -> set[int]:
        """Return the living workers that have said that they accept."""
        numbers = self.machine.numbers()
        said = re.findall(r"worker (\d+) accepts", "\n".join(self.machine.journal(UNIT)))
        return {numbers[int(pid)] for pid in said if int(pid) in numbers}

    def wait_for_workers(self) -> None:
        """Wait until all three of them accept."""
        wait_until(lambda: len(self.accepting()) >= 3, 20)


def installed(directory: Path, machine: Machine) -> Service:
    """Install the service with three workers, a Unix socket and a control socket; start nothing."""
    service = Service(directory, machine)
    machine.run(INSTALL, "--wheels", WHEELS)
    with machine.path("/etc/imageserver/imageserver.env").open("a") as file:
        http = "unix:/run/imageserver/http.sock"
        file.write(f"IMAGESERVER_BIND=127.0.0.1:{service.port},{http}\n")
        file.write("IMAGESERVER_ADMIN_BIND=none\nIMAGESERVER_WORKERS=3\n")
        file.write("IMAGESERVER_CONTROL_SOCKET=/run/imageserver/control.sock\n")
    return service


def another_source(machine: Machine, path: str) -> Path:
    """Copy what an operator would have unpacked."""
    source = machine.path(path)
    source.mkdir()
    for part in ("scripts", "conf", "docs", "imageserver"):
        shutil.copytree(ROOT / part, source / part)
    for name in ("pyproject.toml", "README.md", "LICENSE", "gunicorn.conf.py", "constraints.txt"):
        shutil.copy(ROOT / name, source)
    return source


def control(machine: Machine, request: dict[str, object]) -> dict[str, object]:
    """Ask on the control socket, as root."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(machine.path("/run/imageserver/control.sock")))
        sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile() as stream:
            return dict(json.loads(stream.readline()))


def is_refused(service: Service) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", service.port)) != 0


@contextlib.contextmanager
def activated(service: Service, *more: str) -> Iterator[None]:
    """Have systemd hold the addresses, and these as well; afterwards, the server its own."""
    machine = service.machine
    drop_in = machine.path("/run/systemd/system/imageserver.socket.d/test.conf")
    sockets = ("/run/imageserver/http.sock", "/run/imageserver/control.sock")
    addresses = ["", f"127.0.0.1:{service.port}", *sockets, *more]
    lines = [f"ListenStream={address}" for address in addresses]
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("\n".join(["[Socket]", *lines, ""]))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "stop", "imageserver")
    machine.run("systemctl", "start", "imageserver.socket")
    yield
    machine.run("systemctl", "stop", "imageserver.socket", "imageserver.service")
    shutil.rmtree(drop_in.parent)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "imageserver")


@contextlib.contextmanager
def transfers(service: Service, url: str, content: bytes) -> Iterator[None]:
    """Have a GET and a PUT of an image's content under way; afterwards, finish and check both."""
    first, rest = content[: 1 << 20], content[1 << 20 :]
    with (
        reading(service, url) as reader,
        putting(service, url, len(content), first) as (writer, stream),
    ):
        yield
        with ThreadPoolExecutor(1) as pool:
            received = pool.submit(rest_of, reader, len(content))
            writer.sendall(rest)
            assert read_answer(stream).json == {"ok": True, "bytes_written": len(content)}
            assert received.result() == content
