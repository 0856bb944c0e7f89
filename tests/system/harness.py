# SPDX-License-Identifier: Apache-2.0
"""Real servers for tests: gunicorn as it is started in production, qemu-nbd, nbdkit.

Imports nothing of the package. Everything started here is ended, by pid, by the context
manager that started it; every wait polls with a deadline.
"""

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

ROOT = Path(__file__).resolve().parents[2]
GUNICORN = Path(sys.executable).with_name("gunicorn")
T = TypeVar("T")


def wait_until(what: Callable[[], T], seconds: float = 10.0) -> T:
    """Poll until ``what`` returns something true; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, f"still {found!r} after {seconds} s"
        time.sleep(0.01)


def with_sbin(path: str) -> str:
    """Return a PATH with the directories that Debian leaves out of a user's: haproxy is there."""
    found = path.split(os.pathsep)
    return os.pathsep.join([*found, *(d for d in ("/usr/sbin", "/sbin") if d not in found)])


def program(name: str) -> str:
    """Return a program's path; a missing one fails the test."""
    path = shutil.which(name, path=with_sbin(os.environ.get("PATH", os.defpath)))
    assert path is not None, f"{name} is missing: run scripts/setup"
    return path


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.json["error"])

    @property
    def refusal(self) -> tuple[int, str]:
        """Return status and message of an error that looks as every error must (docs/api.md)."""
        common = {
            "Accept-Ranges": "bytes",
            "Access-Control-Allow-Methods": "GET, PUT, OPTIONS",
            "Cache-Control": "no-store",
            "Content-Type": "application/json",
            "Content-Length": str(len(self.body)),
        }
        assert {name: self.headers[name] for name in common} == common
        message = self.error
        assert self.body == json.dumps({"error": message}, separators=(",", ":")).encode()
        return self.status, message

    @property
    def fields(self) -> dict[str, str]:
        """The header fields, lower-case, without those of any HTTP server's own."""
        own = {"server", "date", "connection", "x-request-id"}
        return {k.lower(): v for k, v in self.headers.items() if k.lower() not in own}


class Server:
    """A running imageserver: settings as keywords (``max_readers=2``), transfers as files."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.directory = directory
        self.config = directory / "config"
        self.runtime = directory / "run"
        self.log_path = directory / "server.log"
        self.config.mkdir(mode=0o700, exist_ok=True)
        self.port = free_port()
        values = {
            "bind": f"127.0.0.1:{self.port}",
            "workers": 3,
            "config_dir": self.config,
            "runtime_dir": self.runtime,
            "admin_bind": "none",
        } | settings
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("IMAGESERVER_")}
        self.env |= {f"IMAGESERVER_{k.upper()}": str(v) for k, v in values.items()}
        self.workers = int(str(values["workers"]))
        #: What starts it; a test may wrap it (unshare, strace) if the pid stays gunicorn's.
        self.command = [str(GUNICORN)]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start the server and wait until every worker accepts."""
        with self.log_path.open("ab") as log:
            before = log.tell()
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        wait_until(lambda: self.is_dead() or self._accepting(before) >= self.workers, 30)
        assert not self.is_dead(), self.log
        return self

    def _accepting(self, before: int) -> int:
        """Count the workers that have said so since the log had ``before`` bytes."""
        if "gthread" in self.command:  # gunicorn's own workers do not say
            with contextlib.suppress(OSError):
                return self.workers * (self.request("GET", "/").status == 404)
        return self.log_path.read_bytes()[before:].count(b" accepts connections")

    def is_dead(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def stop(self, seconds: float = 20) -> int:
        """End the server (SIGTERM, after ``seconds`` SIGKILL); return its exit status."""
        assert self.process is not None
        pids = self.worker_pids() if not self.is_dead() else []
        if not self.is_dead():
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def worker_pids(self) -> list[int]:
        """Return the pids of the master's living children."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def worker_of(self, sock: socket.socket, workers: Sequence[int] = ()) -> int:
        """Return the pid of the worker, of these or of all, that has accepted a connection."""
        client, server = f":{sock.getsockname()[1]:04X}", f":{self.port:04X}"

        def find() -> int:
            lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            inodes = {f[9] for f in lines if f[1].endswith(server) and f[2].endswith(client)}
            for pid in workers or self.worker_pids():
                for fd in Path(f"/proc/{pid}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        if os.readlink(fd)[8:-1] in inodes:
                            return pid
            return 0

        return wait_until(find)

    def holders(self) -> list[str]:
        """Return who holds a slot or shows as running now: ``READ transfer`` and so on, sorted."""
        code = (
            "import sys\n"
            "from imageserver.runtime.slottable import SharedTable\n"
            "from imageserver.core.slots import Kind\n"
            "for held in SharedTable(sys.argv[1], {}).holders(Kind.READ, Kind.WRITE, Kind.OTHER):\n"
            "    print(held.kind.name, held.transfer)\n"
        )
        command = [sys.executable, "-c", code, str(self.runtime)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return sorted(done.stdout.splitlines())

    def add(self, name: str, **fields: object) -> str:
        """Write a transfer file; return the path of its image on the server."""
        temporary = self.config / f".{name}.new"
        temporary.write_text(json.dumps(fields))
        temporary.chmod(0o600)
        temporary.rename(self.config / name)
        return f"/images/{name}"

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30,
    ) -> Answer:
        """Make one request on a connection of its own."""
        with contextlib.closing(self.connect(timeout)) as connection:
            return exchange(connection, method, path, body, headers)

    def bare(self, method: str, path: str, *fields: str, body: bytes = b"") -> Answer:
        """Make a request of exactly these header fields, then say that nothing more comes."""
        head = "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", "Host: x", *fields))
        with self.raw(head.encode() + b"\r\n" + body) as sock:
            sock.shutdown(socket.SHUT_WR)
            response = http.client.HTTPResponse(sock)
            response.begin()
            return Answer(response.status, response.headers, response.read())

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def raw(self, data: bytes = b"", timeout: float = 30) -> socket.socket:
        """Open a bare socket and send ``data``."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        sock.sendall(data)
        return sock


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Make one request on an open connection."""
    connection.request(method, path, body, dict(headers or {}))
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


def repeatable(seed: object) -> random.Random:
    """Return a source of the same random numbers each time."""
    return random.Random(str(seed))  # noqa: S311 - test data, not secrets


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def qemu_img(*arguments: object, timeout: float | None = None) -> str:
    """Run qemu-img, for ``timeout`` seconds at most; return what it prints."""
    command = [program("qemu-img"), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout)
    return done.stdout


def qemu_io(image: Path, fmt: str, *commands: str, timeout: float | None = None) -> None:
    """Run qemu-io commands on an image (``write -P 7 0 64k``, ``write -z 64k 64k`` ...)."""
    arguments = [part for command in commands for part in ("-c", command)]
    command = [program("qemu-io"), "-f", fmt, *arguments, str(image)]
    subprocess.run(command, check=True, capture_output=True, timeout=timeout)


@contextlib.contextmanager
def process(
    command: list[str], is_ready: Callable[[], object]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as running:
        try:
            wait_until(lambda: running.poll() is not None or is_ready())
            assert running.poll() is None, running.stderr and running.stderr.read()
            yield running
        finally:
            running.send_signal(signal.SIGCONT)
            running.terminate()
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()


@contextlib.contextmanager
def qemu_nbd(
    image: Path, *options: str, fmt: str = "raw", export: str = "", sock: Path | None = None
) -> Iterator[Path]:
    """Serve an image with qemu-nbd, 32 clients at most; yield the socket's path."""
    path = sock or image.with_name(image.name + ".sock")
    command = [program("qemu-nbd"), "--shared=32", "--persistent", f"--format={fmt}"]
    command += [f"--socket={path}", f"--export-name={export}", *options, str(image)]
    try:
        with process(command, lambda: _greets(path)):
            yield path
    finally:
        path.unlink(missing_ok=True)


def _greets(path: Path) -> bool:
    """Tell whether an NBD server speaks: qemu-nbd listens before it has measured its image."""
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(5)
        sock.connect(str(path))
        return sock.recv(8) == b"NBDMAGIC"
    return False


def listens(path: Path) -> bool:
    """Tell whether a socket accepts connections, without making one (some servers count)."""
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    accepting = 0x10000  # __SO_ACCEPTCON
    return any(f[-1] == str(path) and int(f[3], 16) & accepting for f in sockets)


@contextlib.contextmanager
def nbdkit(sock: Path, *arguments: str) -> Iterator[Path]:
    """Serve with nbdkit in the foreground; yield the socket."""
    command = [
        program("nbdkit"),
        "--foreground",
        "--exit-with-parent",
        f"--unix={sock}",
        *arguments,
    ]
    try:
        with process(command, lambda: listens(sock)):
            yield sock
    finally:
        sock.unlink(missing_ok=True)
