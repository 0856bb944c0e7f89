# SPDX-License-Identifier: Apache-2.0
"""What one run works on: a private directory on tmpfs, images in it, servers over them.

Whatever is made here is gone, and whatever is started has ended, when the world is closed.
Servers start at first use, so that a single row starts only its own.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from lab.ovirt import OvirtDaemon, ovirt_daemon
from lab.processes import ROOT, LabFailed, answers, children, free_port, process, program
from lab.servers import Server, nbdkit, qemu_nbd, settings_in

from benchmark.clients import Clients
from benchmark.figures import GIB, KIB, MIB
from imageserver.settings import Settings

_HERE = Path(__file__).resolve().parent
_TMPFS = "/dev/shm"  # noqa: S108 - made private by mkdtemp
#: Settings that the environment does not change.
_OURS = {"bind", "config_dir", "runtime_dir", "admin_bind", "drain_timeout"}
#: Sources have this much more than an image: bodies taken at two offsets differ everywhere, so
#: that an image written over by the one, then by the other, shows every byte that was not.
SHIFT = 64 * KIB
#: As many as oVirt's daemon lets write at once.
MAX_WRITERS = 8
#: Who is compared over NBD.
CONTENDERS = ("ours", "reference", "nbdcopy", "ovirt")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work a run is."""

    rounds: int
    image: int
    """Bytes of an image with data."""
    turns: int
    """Rounds where a rate is measured: many and short, for others use the machine as well."""
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
    crowd: int
    """What there is much of is divided by this."""
    far: int
    """Bytes of the image that goes over a long way."""
    patience: float
    """How many seconds it may take there."""
    sampled_seconds: int
    """How long stacks are sampled."""


FULL = Scale(3, 512 * MIB, 11, 0.15, 2.0, 256 * GIB, 100 * GIB, 8 << 40, 1, 128 * MIB, 5.0, 30)
QUICK = Scale(2, 16 * MIB, 2, 0.05, 0.3, GIB, 10 * GIB, 64 * GIB, 20, 4 * MIB, 5.0, 3)


class ImageServer(Server):
    """The image server, with gunicorn's arguments."""

    @property
    def pids(self) -> list[int]:
        """All pids, the master's first."""
        return [self.pid, *self.worker_pids()]

    def add_nbd(self, sock: Path) -> str:
        """Make a transfer for an NBD server's default export; return its path."""
        return self.add(sock.name, backend="nbd", socket=str(sock))

    def add_raw(self, path: Path) -> str:
        """Make a transfer for a file that is a disk; return its path."""
        return self.add(f"raw-{path.name}", backend="file", file=str(path), format="raw")

    def add_file(self, path: Path) -> str:
        """Make a transfer for a file; return its path."""
        return self.add(path.name, backend="file", file=str(path))


@dataclass(frozen=True)
class Other:
    """Another HTTP server."""

    port: int
    pid: int

    @property
    def pids(self) -> list[int]:
        """All pids, the first one's first."""
        return [self.pid, *children(self.pid)]


class World:
    """Everything of one run. Use it in a ``with`` block."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.clients = Clients()
        self._opened = contextlib.ExitStack()
        self._opened.callback(self.clients.close)

    def __enter__(self) -> Self:
        tmpfs = _TMPFS if os.path.isdir(_TMPFS) else None
        self.directory = Path(tempfile.mkdtemp(prefix="imageserver-bench-", dir=tmpfs))
        self._opened.callback(shutil.rmtree, self.directory, ignore_errors=True)
        needed = 6 * self.scale.image
        if shutil.disk_usage(self.directory).free < needed:
            self._opened.close()
            raise LabFailed(f"{tmpfs} has no room for {needed // MIB} MiB of images")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._opened.close()

    # Images

    def data(self, name: str, size: int = 0) -> Path:
        """Return a file of random bytes, made at first use; of an image's size if not told."""
        path = self.directory / name
        if not path.exists():
            with path.open("wb") as file:
                for _ in range(0, size or self.scale.image, MIB):
                    file.write(os.urandom(MIB))
                file.truncate(size or self.scale.image)
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
        subprocess.run([ROOT / "scripts" / "make-pki", self.directory / "pki"], check=True)
        return self.directory / "pki"

    @cached_property
    def source(self) -> Path:
        """What bodies of PUTs are taken from."""
        return self.data("source", self.scale.image + SHIFT)

    # Servers, for the whole run

    @cached_property
    def readable(self) -> tuple[Path, dict[str, Path]]:
        """An image with data, and per contender the socket of a read-only qemu-nbd over it."""
        image = self.data("read.raw")
        return image, self._opened.enter_context(self.served(image, CONTENDERS, "--read-only"))

    @cached_property
    def writable(self) -> tuple[Path, dict[str, Path]]:
        """An image to write, and per contender the socket of a qemu-nbd over it."""
        image = self.data("write.raw")
        return image, self._opened.enter_context(self.served(image, CONTENDERS, "--discard=unmap"))

    @cached_property
    def file(self) -> Path:
        """An image file to write."""
        return self.data("file.raw")

    @cached_property
    def server(self) -> ImageServer:
        """The image server as it comes, with the settings of the environment."""
        return self._opened.enter_context(self.image_server("server"))

    @cached_property
    def parallel(self) -> ImageServer:
        """The image server as oVirt's daemon is: several writers at once. Two workers."""
        settings = {"workers": 2, "max_writers": MAX_WRITERS}
        return self._opened.enter_context(self.image_server("parallel", **settings))

    @cached_property
    def ovirt(self) -> OvirtDaemon:
        """OVirt's daemon."""
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(self.room("ovirt"))
            daemon = stack.enter_context(ovirt_daemon(directory))
            self._opened.push(stack.pop_all())
        return daemon

    @cached_property
    def reference(self) -> Other:
        """The synchronous reference over the images above."""
        paths = [self.file]
        for image, socks in (self.readable, self.writable):
            paths += [image, socks["reference"]]
        command = [sys.executable, _HERE / "reference.py"]
        return self._opened.enter_context(_other(lambda port: [*command, port, *paths]))

    @cached_property
    def nginx(self) -> int:
        """The port of an nginx over the run's directory."""
        nginx, own = program("nginx"), self.directory / "nginx"
        own.mkdir()

        def command(port: int) -> list[object]:
            text = "user root;\n" if os.geteuid() == 0 else ""
            text += _NGINX.format(port=port, own=own, root=self.directory)
            (own / "nginx.conf").write_text(text)
            return [nginx, "-p", own, "-c", own / "nginx.conf", "-e", own / "error.log"]

        return self._opened.enter_context(_other(command)).port

    # Servers, for a block

    @contextlib.contextmanager
    def haproxy(self, routes: dict[str, str], **hosts: int) -> Iterator[Other]:
        """Run conf/haproxy.cfg; ``routes``: path to host, ``hosts``: name to port."""
        with self.room("haproxy") as directory:
            table = directory / "haproxy.map"
            lines = [f"{os.path.basename(path)} {host}\n" for path, host in routes.items()]
            table.write_text("".join(lines), encoding="utf-8")
            environ = {f"LB_{k.upper()}": f"127.0.0.1:{v}" for k, v in hosts.items()}
            environ |= {"LB_ADMIN": f"{directory}/admin", "LB_MAP": str(table)}
            environ |= {"LB_ROUTING": "map"} | ({"LB_UNPRIVILEGED": "1"} if os.geteuid() else {})

            def command(port: int) -> list[object]:
                environ["LB_BIND"] = f"127.0.0.1:{port}"
                return [program("haproxy"), "-f", ROOT / "conf" / "haproxy.cfg"]

            with _other(command, environ) as proxy:
                yield proxy

    @contextlib.contextmanager
    def image_server(self, name: str, *arguments: str, **settings: object) -> Iterator[ImageServer]:
        """Run the image server, with settings and arguments for gunicorn, in its directory."""
        with self.room(name) as directory:
            server = self.prepared(directory, **settings)
            server.command += arguments
            with server:
                yield server

    def prepared(self, directory: Path, **settings: object) -> ImageServer:
        """Return an image server that is still to be started."""
        tried = {k: v for k, v in settings_in(os.environ).items() if k not in _OURS}
        tried |= {"drain_timeout": 3, "admin_bind": f"unix:{directory}/admin", **settings}
        tried.setdefault("workers", Settings.from_environ({}).workers)
        return ImageServer(directory, **tried)

    @contextlib.contextmanager
    def room(self, name: str) -> Iterator[Path]:
        """Make a directory for a block."""
        directory = self.directory / name
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @contextlib.contextmanager
    def served(
        self, image: Path, names: tuple[str, ...], *options: str
    ) -> Iterator[dict[str, Path]]:
        """Serve a raw image to each of these by a qemu-nbd of its own; yield the sockets.

        So it is in life, and what one client asks for changes how the process allocates
        afterwards, and with it the speed of whoever comes next.
        """
        with contextlib.ExitStack() as stack:
            yield {
                name: stack.enter_context(
                    qemu_nbd(
                        image, *options, sock=image.with_suffix(f".{name}.sock"), is_locking=False
                    )
                )
                for name in names
            }

    @contextlib.contextmanager
    def serving(self, image: Path, *options: str) -> Iterator[Path]:
        """Serve a raw image to the image server only; yield the socket."""
        with self.served(image, ("ours",), *options) as socks:
            yield socks["ours"]

    def nbdkit(self, name: str, *arguments: str) -> contextlib.AbstractContextManager[Path]:
        """Serve with an nbdkit plugin; yield the socket."""
        return nbdkit(self.directory / f"{name}.sock", *arguments)


@contextlib.contextmanager
def _other(
    command: Callable[[int], list[object]], environ: dict[str, str] | None = None
) -> Iterator[Other]:
    """Run a server at a port that its command is told."""
    port = free_port()
    words = [str(word) for word in command(port)]
    with process(words, lambda: answers(port), os.environ | (environ or {})) as running:
        yield Other(port, running.pid)


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
