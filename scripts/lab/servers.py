# SPDX-License-Identifier: Apache-2.0
"""Real servers: gunicorn as it is started in production, qemu-nbd, nbdkit.

Whoever starts one ends it, by ``with`` or ``stop``.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from imageserver.core.slots import Holder, Kind
from imageserver.runtime.slottable import SharedTable
from lab.processes import (
    LabFailed,
    answers,
    children,
    end,
    free_port,
    process,
    program,
    start,
)

GUNICORN = Path(sys.executable).with_name("gunicorn")
_PREFIX = "IMAGESERVER_"


def settings_in(environ: Mapping[str, str]) -> dict[str, object]:
    """Return the server's settings in an environment, by their names as keywords."""
    named = {k: v for k, v in environ.items() if k.startswith(_PREFIX)}
    return {k.removeprefix(_PREFIX).lower(): v for k, v in named.items()}


def put_transfer(config: Path, name: str, fields: Mapping[str, object], mode: int = 0o600) -> None:
    """Write a transfer file, or replace it, at once."""
    temporary = config / f".{name}.new"
    try:
        temporary.touch(mode)
        temporary.write_text(json.dumps(fields))
        temporary.chmod(mode)
        temporary.rename(config / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Server:
    """An image server in a directory of its own: settings as keywords (``max_readers=2``)."""

    process: subprocess.Popen[bytes] | None = None

    def __init__(self, directory: Path, **settings: object) -> None:
        """Prepare it, with no setting of this process's environment."""
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
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(_PREFIX)}
        self.env |= {f"{_PREFIX}{k.upper()}": str(v) for k, v in values.items()}
        self.workers = int(str(values["workers"]))
        #: What starts it; a test may wrap it (unshare, strace) if the pid stays gunicorn's.
        self.command = [str(GUNICORN)]

    def start(self) -> Self:
        """Start it, and wait until every worker accepts."""
        with self.log_path.open("ab") as log:
            before = log.tell()
            self.process = start(
                self.command, log, lambda running: self._is_up(running, before), self.env
            )
        return self

    def _is_up(self, running: subprocess.Popen[bytes], before: int) -> bool:
        if "gthread" in self.command:  # gunicorn's own workers do not say that they accept
            return answers(self.port) and len(children(running.pid)) >= self.workers
        return self._accepting(before) >= self.workers

    def _accepting(self, before: int) -> int:
        """Count the workers that have said so since the log had ``before`` bytes."""
        return self.log_path.read_bytes()[before:].count(b" accepts connections")

    def is_dead(self) -> bool:
        """Tell whether it has ended, or was never started."""
        return self.process is None or self.process.poll() is not None

    def stop(self, seconds: float = 20) -> int:
        """End it; return its exit status.

        Raises:
            subprocess.TimeoutExpired: it had to be killed after ``seconds``.
        """
        return end(self._running, seconds)

    def signal(self, number: int) -> None:
        """Send a signal to the master."""
        self._running.send_signal(number)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise LabFailed("the server was never started")
        return self.process

    @property
    def log(self) -> str:
        """What it has printed."""
        return self.log_path.read_text()

    @property
    def pid(self) -> int:
        """The master's pid."""
        return self._running.pid

    def worker_pids(self) -> list[int]:
        """Return the pids of the master's living children."""
        return children(self.pid)

    def holders(self) -> list[str]:
        """Return who holds a slot or shows as running now: ``READ transfer`` and so on, sorted."""
        with contextlib.closing(slots(self.runtime)) as table:
            return sorted(f"{held.kind.name} {held.transfer}" for held in holding(table))

    def add(self, name: str, **fields: object) -> str:
        """Write a transfer file; return the path of its image on the server."""
        put_transfer(self.config, name, fields)
        return f"/images/{name}"


def slots(runtime: Path) -> SharedTable:
    """Open the slot table of a running server; whoever does closes it."""
    return SharedTable(str(runtime), {})


def holding(table: SharedTable) -> list[Holder]:
    """Return the records of requests."""
    return table.holders(Kind.READ, Kind.WRITE, Kind.OTHER)


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


class QemuNbd:
    """A qemu-nbd that serves an image; it may be killed, stopped and started again."""

    process: subprocess.Popen[bytes] | None = None

    def __init__(
        self,
        image: Path,
        *options: str,
        fmt: str = "raw",
        export: str = "",
        sock: Path | None = None,
        is_locking: bool = True,
    ) -> None:
        """``is_locking``: keep others from serving the same image."""
        self.image = image
        self.socket = sock or image.with_name(image.name + ".sock")
        opened = [f"--format={fmt}", str(image)]
        if not is_locking:
            file = f"file.driver=file,file.locking=off,file.filename={image}"
            opened = ["--image-opts", f"driver={fmt},{file}"]
        self._command = [program("qemu-nbd"), "--shared=64", "--persistent", *options]
        self._command += [f"--socket={self.socket}", f"--export-name={export}", *opened]

    def start(self) -> None:
        """Start it, and wait until it greets."""
        self.socket.unlink(missing_ok=True)
        with tempfile.TemporaryFile() as log:
            self.process = start(self._command, log, lambda _: _greets(self.socket))

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """End it without a warning; its socket stays behind, as it does after a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self) -> None:
        """End it, and what it has not written is written."""
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                end(self.process)
            self.process = None
        self.socket.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill it, and start it again."""
        self.kill()
        self.start()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Answer nothing for the time being."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()


@contextlib.contextmanager
def qemu_nbd(image: Path, *options: str, **more: Any) -> Iterator[Path]:  # noqa: ANN401 - as above
    """Serve an image until the block ends; yield the socket's path."""
    with QemuNbd(image, *options, **more) as running:
        yield running.socket


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
    """Serve with nbdkit until the block ends; yield the socket."""
    command = [program("nbdkit"), "--foreground", "--exit-with-parent", f"--unix={sock}"]
    try:
        with process([*command, *arguments], lambda: listens(sock)):
            yield sock
    finally:
        sock.unlink(missing_ok=True)
