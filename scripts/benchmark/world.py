# SPDX-License-Identifier: Apache-2.0
"""What one run works on: a private directory on tmpfs, images in it, servers over them.

Whatever is made here is gone, and whatever is started has ended, when the world is closed.
Servers start at first use, so that a single row starts only its own.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import process

from imageserver.core.slots import Kind
from imageserver.runtime.slottable import SharedTable
from imageserver.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
_HERE = Path(__file__).resolve().parent
_TMPFS = "/dev/shm"  # noqa: S108 - made private by mkdtemp
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
#: Sources have this much more than an image: bodies taken at two offsets differ everywhere, so
#: that an image written over by the one, then by the other, shows every byte that was not.
SHIFT = 64 * KIB


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work a run is."""

    rounds: int
    image: int
    """Bytes of an image with data."""
    seconds: float
    """How long a rate is measured."""
    hold_seconds: float
    """How long long transfers run while memory is sampled."""
    mapped: int
    """Bytes of the image with many extents."""
    sparse: int
    """Bytes of the large sparse image."""
    zeroed: int
    """Bytes of the image that is zeroed."""


FULL = Scale(5, GIB, 2.0, 2.0, 256 * GIB, 100 * GIB, 8 << 40)
QUICK = Scale(2, 16 * MIB, 0.2, 0.5, GIB, 10 * GIB, 64 * GIB)


class Server:
    """A running imageserver and its transfers."""

    def __init__(self, directory: Path, pid: int, port: int) -> None:
        self._config = directory / "config"
        self.runtime = directory / "run"
        self.pid = pid
        self.port = port

    @property
    def workers(self) -> list[int]:
        """Return the workers' pids."""
        return process.children(self.pid)

    @property
    def pids(self) -> list[int]:
        """Return all pids, the master's first."""
        return [self.pid, *self.workers]

    def is_accepting(self) -> bool:
        """Tell whether every worker of our class is up: the slot table has a row for each."""
        table = SharedTable(str(self.runtime), {})
        rows = [row.expected for row in table.holders(Kind.WORKER)]
        table.close()
        return all(rows) and len(rows) == len(self.workers)

    def add_nbd(self, sock: Path) -> str:
        """Make a transfer for an NBD server's default export; return its path."""
        return self._add(sock.name, {"backend": "nbd", "socket": str(sock)})

    def add_file(self, path: Path) -> str:
        """Make a transfer for a file; return its path."""
        return self._add(path.name, {"backend": "file", "file": str(path)})

    def _add(self, name: str, fields: dict[str, str]) -> str:
        (self._config / name).write_text(json.dumps(fields), encoding="utf-8")
        return f"/images/{name}"


#: Who is compared over NBD.
CONTENDERS = ("ours", "reference", "nbdcopy")


class World:
    """Everything of one run. Use it in a ``with`` block."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Self:
        tmpfs = _TMPFS if os.path.isdir(_TMPFS) else None
        self.directory = Path(tempfile.mkdtemp(prefix="imageserver-bench-", dir=tmpfs))
        self._opened.callback(shutil.rmtree, self.directory, ignore_errors=True)
        needed = 6 * self.scale.image
        if shutil.disk_usage(self.directory).free < needed:
            self._opened.close()
            raise process.ServerFailed(f"{tmpfs} has no room for {needed // MIB} MiB of images")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._opened.close()

    # Images

    def data(self, name: str, size: int) -> Path:
        """Return a file of random bytes, made at first use."""
        path = self.directory / name
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(0, size, MIB):
                    file.write(os.urandom(MIB))
                file.truncate(size)
        return path

    def sparse(self, name: str, size: int) -> Path:
        """Return a file that is one hole."""
        path = self.directory / name
        with path.open("ab") as file:
            file.truncate(size)
        return path

    @cached_property
    def pki(self) -> Path:
        """Certificates for TLS on localhost."""
        process.run([str(ROOT / "scripts" / "make-pki"), str(self.directory / "pki")])
        return self.directory / "pki"

    @cached_property
    def source(self) -> Path:
        """What bodies of PUTs are taken from."""
        return self.data("source", self.scale.image + SHIFT)

    # Servers, for the whole run

    @cached_property
    def readable(self) -> tuple[Path, dict[str, Path]]:
        """An image with data, and per contender the socket of a read-only qemu-nbd over it."""
        return self._served("read.raw", "--read-only")

    @cached_property
    def writable(self) -> tuple[Path, dict[str, Path]]:
        """An image to write, and per contender the socket of a qemu-nbd over it."""
        return self._served("write.raw", "--discard=unmap")

    def _served(self, name: str, *options: str) -> tuple[Path, dict[str, Path]]:
        # To each its own qemu-nbd, as in life: what one client asks for changes how the
        # process allocates afterwards, and with it the speed of whoever comes next.
        image = self.data(name, self.scale.image)
        socks = {
            who: self._opened.enter_context(self.qemu_nbd(image, *options, who=who))
            for who in CONTENDERS
        }
        return image, socks

    @cached_property
    def file(self) -> Path:
        """An image file to write."""
        return self.data("file.raw", self.scale.image)

    @cached_property
    def server(self) -> Server:
        """The image server as it comes, with the settings of the environment."""
        return self._opened.enter_context(self.image_server("server"))

    @cached_property
    def reference(self) -> Server:
        """The synchronous reference over the images above."""
        port = process.free_port()
        paths = [self.file]
        for image, socks in (self.readable, self.writable):
            paths += [image, socks["reference"]]
        command = [sys.executable, str(_HERE / "reference.py"), str(port), *map(str, paths)]
        pid = self._start(command, "reference", port)
        return Server(self.directory / "reference", pid, port)

    @cached_property
    def nginx(self) -> int:
        """The port of an nginx over the run's directory."""
        port = process.free_port()
        directory = self.directory / "nginx"
        directory.mkdir()
        config = directory / "nginx.conf"
        config.write_text(_NGINX.format(port=port, own=directory, root=self.directory))
        if os.geteuid() == 0:
            config.write_text("user root;\n" + config.read_text())
        command = [process.program("nginx"), "-p", str(directory), "-c", str(config)]
        self._start([*command, "-e", str(directory / "error.log")], "nginx", port)
        return port

    @contextlib.contextmanager
    def haproxy(self, routes: dict[str, str], **hosts: int) -> Iterator[Server]:
        """Run conf/haproxy.cfg; ``routes``: path to host, ``hosts``: name to port."""
        port = process.free_port()
        directory = self.directory / "haproxy"
        directory.mkdir()
        table = directory / "haproxy.map"
        lines = [f"{os.path.basename(path)} {host}\n" for path, host in routes.items()]
        table.write_text("".join(lines), encoding="utf-8")
        environ = os.environ | {f"LB_{k.upper()}": f"127.0.0.1:{v}" for k, v in hosts.items()}
        environ |= {"LB_BIND": f"127.0.0.1:{port}", "LB_ADMIN": str(directory / "admin")}
        environ |= {"LB_MAP": str(table), "LB_ROUTING": "map"}
        if os.geteuid():
            environ["LB_UNPRIVILEGED"] = "1"
        command = [process.program("haproxy"), "-f", str(ROOT / "conf" / "haproxy.cfg")]
        log = self.directory / "haproxy.log"
        started = process.server(command, log, lambda _: process.answers(port), environ)
        try:
            with started as pid:
                yield Server(directory, pid, port)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _start(self, command: list[str], name: str, port: int) -> int:
        log = self.directory / f"{name}.log"
        started = process.server(command, log, lambda _: process.answers(port))
        return self._opened.enter_context(started)

    # Servers, for a block

    @contextlib.contextmanager
    def image_server(
        self, name: str, *arguments: str, settings: dict[str, object] | None = None
    ) -> Iterator[Server]:
        """Run the image server, with settings and arguments for gunicorn, in its directory."""
        directory = self.directory / name
        (directory / "config").mkdir(mode=0o700, parents=True)
        port = process.free_port()
        values: dict[str, object] = {
            "bind": f"127.0.0.1:{port}",
            "config_dir": directory / "config",
            "runtime_dir": directory / "run",
            "drain_timeout": 3,
            "admin_bind": f"unix:{directory}/admin",
            **(settings or {}),
        }
        environ = os.environ | {f"IMAGESERVER_{k.upper()}": str(v) for k, v in values.items()}
        count = Settings.from_environ(environ).workers

        def is_up(pid: int) -> bool:
            # The master listens before it has workers; only ours have rows in the slot table.
            server = Server(directory, pid, port)
            up = process.answers(port) and len(server.workers) == count
            return up and ("gthread" in arguments or server.is_accepting())

        command = [str(Path(sys.executable).with_name("gunicorn")), *arguments]
        log = self.directory / f"{name}.log"
        try:
            with process.server(command, log, is_up, environ, ROOT) as pid:
                yield Server(directory, pid, port)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def constant(self, name: str, *arguments: str) -> Iterator[Server]:
        """Run the constant Falcon responder under the image server's gunicorn."""
        options = ["--pythonpath", str(_HERE), *arguments, "constant:app"]
        with self.image_server(name, *options) as server:
            yield server

    @contextlib.contextmanager
    def qemu_nbd(self, image: Path, *options: str, who: str = "ours") -> Iterator[Path]:
        """Serve a raw image, unlocked, for several of these take turns; yield the socket."""
        sock = image.with_suffix(f".{who}.sock")
        command = [process.program("qemu-nbd"), "--shared=32", "--persistent", "--image-opts"]
        opened = f"driver=raw,file.driver=file,file.locking=off,file.filename={image}"
        command += [f"--socket={sock}", *options, opened]
        with process.server(command, sock.with_suffix(".log"), lambda _: sock.exists()):
            yield sock

    @contextlib.contextmanager
    def nbdkit(self, name: str, *arguments: str) -> Iterator[Path]:
        """Serve with an nbdkit plugin; yield the socket."""
        sock = self.directory / f"{name}.sock"
        command = [process.program("nbdkit"), "--foreground", f"--unix={sock}", *arguments]
        with process.server(command, self.directory / f"{name}.log", lambda _: sock.exists()):
            yield sock


_NGINX = """
daemon off;
worker_processes auto;
pid {own}/pid;
error_log {own}/error.log;
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    default_type application/octet-stream;
    client_body_temp_path {own}/body;
    proxy_temp_path {own}/proxy;
    fastcgi_temp_path {own}/fastcgi;
    uwsgi_temp_path {own}/uwsgi;
    scgi_temp_path {own}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        # As an image server behind haproxy: probed, and asked for what its map knows.
        location /images/ {{ return 200; }}
        location ~ ^/images/plain-(.+)$ {{ alias {root}/$1; }}
    }}
}}
"""
