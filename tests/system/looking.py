# SPDX-License-Identifier: Apache-2.0
"""Images for imagectl to look at: one of every kind of extent, and one of very many."""

import contextlib
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.system.harness import Server, qemu_img, qemu_io, qemu_nbd
from tests.system.threads import serving


def url_of(server: Server, name: str) -> str:
    return f"http://127.0.0.1:{server.port}/images/{name}"


@contextlib.contextmanager
def mixed(server: Server, home: Path) -> Iterator[str]:
    """Serve 8 MiB: 1 of data, 1 of changed data, 1 that was zeroed since, 5 of zeros."""
    path = home / "image.qcow2"
    qemu_img("create", "-f", "qcow2", path, "8M")
    qemu_io(path, "qcow2", "write -P 1 0 3M")
    qemu_img("bitmap", "--add", path, "b0")
    qemu_io(path, "qcow2", "write -P 2 1M 1M", "write -z 2M 1M")
    with qemu_nbd(path, "--bitmap=b0", fmt="qcow2") as sock:
        name = str(uuid.uuid4())
        server.add(name, socket=str(sock), export_bitmap="b0")
        yield url_of(server, name)


@contextlib.contextmanager
def fragmented(count: int) -> Iterator[str]:
    """Serve an image of so many extents, and nothing but extents; yield its URL."""
    handler = type("Handler", (_Fragmented,), {"count": count})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}/images/x"


class _Fragmented(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    count: int

    def log_message(self, *_args: object) -> None: ...

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_OPTIONS(self) -> None:
        self.answer(b'{"features":["extents"]}')

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(self.count * 65536))
        self.end_headers()

    def do_GET(self) -> None:
        pattern = '{"start":%d,"length":65536,"zero":%s}'
        extents = (pattern % (n * 65536, ("false", "true")[n % 2]) for n in range(self.count))
        self.answer(f"[{','.join(extents)}]".encode())
