# SPDX-License-Identifier: Apache-2.0
"""The synchronous reference: what one writes first, done properly.

A thread per connection, stdlib ``http.server``, 256 KiB ``pread``/``pwrite`` over a fresh NBD
connection per request; a file is replaced by a new one, synced. Committed and never
slowed down: ``scripts/bench`` prints its own MiB/s beside every ratio.

    reference.py PORT PATH ...    PATH: an NBD server's Unix socket, or a file

Serves each path under its base name, ``/read.sock``, ``/file.raw``; and, for haproxy, which
routes what the image server serves and probes with OPTIONS, below ``/images`` as well.
"""

import os
import re
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import nbd

PIECE = 256 * 1024


class NbdImage:
    """An NBD export."""

    def __init__(self, path: str) -> None:
        self._nbd = nbd.NBD()
        self._nbd.connect_unix(path)
        self.size = self._nbd.get_size()
        self.close = self._nbd.shutdown

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of [start, stop)."""
        for offset in range(start, stop, PIECE):
            yield self._nbd.pread(min(PIECE, stop - offset), offset)

    def write(self, data: bytes, offset: int) -> None:
        """Write all of ``data``."""
        self._nbd.pwrite(data, offset)


class FileImage:
    """A file; what is written is another that takes its place when all of it is on disk."""

    def __init__(self, path: str) -> None:
        self._path, self._new = path, f"{path}.{threading.get_ident()}"
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes of [start, stop)."""
        self._file.seek(start)
        for offset in range(start, stop, PIECE):
            yield self._file.read(min(PIECE, stop - offset))

    def write(self, data: bytes, offset: int) -> None:
        """Write all of ``data``, the first of which is at 0."""
        if not offset:
            self._file.close()
            self._file = open(self._new, "wb", buffering=0)  # noqa: SIM115 - closed by close
        self._file.write(data)

    def close(self) -> None:
        """Close it; what has been written is the image now."""
        if self._file.writable():
            os.fsync(self._file.fileno())
            os.rename(self._new, self._path)
        self._file.close()


class Handler(BaseHTTPRequestHandler):
    """GET, with one range, and PUT."""

    protocol_version = "HTTP/1.1"
    # Head and body are separate writes: with Nagle, small answers would wait for delayed ACKs.
    disable_nagle_algorithm = True
    images: ClassVar[dict[str, str]] = {}

    def _open(self) -> closing[NbdImage | FileImage]:
        path = self.images[self.path]
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
        return closing(NbdImage(path) if is_socket else FileImage(path))

    def _head(self, status: int, length: int, *more: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*more, ("Content-Length", str(length))):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        """Send the image or a range of it."""
        with self._open() as image:
            wanted = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers.get("Range", ""))
            start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, image.size)
            more = [("Content-Type", "application/octet-stream")]
            if wanted:
                more.append(("Content-Range", f"bytes {start}-{stop - 1}/{image.size}"))
            self._head(206 if wanted else 200, stop - start, *more)
            for piece in image.read(start, stop):
                self.wfile.write(piece)

    def do_OPTIONS(self) -> None:
        """Answer a probe."""
        self._head(200, 0)

    def do_PUT(self) -> None:
        """Write the body over the image."""
        with self._open() as image:
            length = int(self.headers["Content-Length"])
            for offset in range(0, length, PIECE):
                image.write(self.rfile.read(min(PIECE, length - offset)), offset)
        answer = b'{"ok":true}'  # closed, so synced
        self._head(200, len(answer))
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
