# SPDX-License-Identifier: Apache-2.0
"""The synchronous reference: what one writes first, done properly.

A thread per connection, stdlib ``http.server``, 256 KiB ``pread``/``pwrite`` over a fresh NBD
connection per request; files are read and written in place, unsynced. Committed and never
slowed down: ``scripts/bench`` prints its own MiB/s beside every ratio.

    reference.py PORT PATH ...    PATH: an NBD server's Unix socket, or a file

Serves each path under its base name, ``/read.sock``, ``/file.raw``; and, for haproxy, which
routes what the image server serves and probes with OPTIONS, below ``/images`` as well.
"""

import os
import re
import stat
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Protocol

import nbd

PIECE = 256 * 1024


class Image(Protocol):
    """One open image."""

    size: int

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of [start, stop)."""

    def write(self, data: bytes, offset: int) -> None:
        """Write all of ``data``."""

    def close(self) -> None:
        """Let go of it."""


class NbdImage:
    """An NBD export."""

    def __init__(self, path: str) -> None:
        self._nbd = nbd.NBD()
        self._nbd.connect_unix(path)
        self.size = self._nbd.get_size()

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of [start, stop)."""
        for offset in range(start, stop, PIECE):
            yield self._nbd.pread(min(PIECE, stop - offset), offset)

    def write(self, data: bytes, offset: int) -> None:
        """Write all of ``data``."""
        self._nbd.pwrite(data, offset)

    def close(self) -> None:
        """Disconnect."""
        self._nbd.shutdown()


class FileImage:
    """A file."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of [start, stop)."""
        self._file.seek(start)
        for offset in range(start, stop, PIECE):
            yield self._file.read(min(PIECE, stop - offset))

    def write(self, data: bytes, offset: int) -> None:
        """Write all of ``data``."""
        self._file.seek(offset)
        self._file.write(data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_image(path: str) -> Image:
    """Open what ``path`` names."""
    is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    return NbdImage(path) if is_socket else FileImage(path)


class Handler(BaseHTTPRequestHandler):
    """GET, with one range, and PUT."""

    protocol_version = "HTTP/1.1"
    # Head and body are separate writes: with Nagle, small answers would wait for delayed ACKs.
    disable_nagle_algorithm = True
    images: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        """Send the image or a range of it."""
        image = open_image(self.images[self.path])
        try:
            wanted = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
            start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, image.size)
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{image.size}")
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            for piece in image.read(start, stop):
                self.wfile.write(piece)
        finally:
            image.close()

    def do_OPTIONS(self) -> None:
        """Answer a probe."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_PUT(self) -> None:
        """Write the body over the image."""
        image = open_image(self.images[self.path])
        try:
            length = int(self.headers["Content-Length"])
            for offset in range(0, length, PIECE):
                image.write(self.rfile.read(min(PIECE, length - offset)), offset)
        finally:
            image.close()
        answer = b'{"ok":true}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_args: object) -> None:
        """Log nothing."""


def main(port: str, *paths: str) -> None:
    """Serve until killed."""
    names = {f"/{os.path.basename(path)}": path for path in paths}
    Handler.images = names | {f"/images{name}": path for name, path in names.items()}
    ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
