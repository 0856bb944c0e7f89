# SPDX-License-Identifier: Apache-2.0
"""A small image server over HTTP that is honest, but for one lie."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KIB = 1 << 10
#: The image: data, zeros, data.
SIZE = 300 * KIB
ZEROS = (100 * KIB, 200 * KIB)


class Image:
    """What is served, and which lie is told; "" none."""

    def __init__(self, lie: str) -> None:
        self.lie = lie
        data = bytes(range(1, 256)) * (SIZE // 255 + 1)
        self.bytes = bytearray(data[:SIZE])
        self.bytes[slice(*ZEROS)] = bytes(ZEROS[1] - ZEROS[0])
        self.reads = 0
        self.was_busy = False

    def extents(self, start: int, stop: int, *, dirty: bool) -> list[dict[str, Any]]:
        bounds = [0, *ZEROS, SIZE]
        if self.lie == "zero extents are data":
            bounds[2] += 4096
        found = []
        for first, last, zero in zip(bounds[:-1], bounds[1:], (False, True, False), strict=True):
            first, last = max(first, start), min(last, stop)  # noqa: PLW2901 - cut to the span
            if first < last:
                state = {"dirty": first == 0} if dirty else {}
                found.append({"start": first, "length": last - first, **state, "zero": zero})
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    image: Image

    def log_message(self, *_args: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes | object = b"", **fields: str) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", fields.get("length", str(len(text))))
        if self.image.lie == "connections are closed":
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(text)

    def refuse(self, status: int, **fields: str) -> None:
        self.answer(status, {"error": f"status {status}"}, **fields)

    def unknown(self) -> bool:
        if not self.path.startswith("/images/x"):
            self.refuse(200 if self.image.lie == "every id is known" else 404)
            return True
        return False

    def do_OPTIONS(self) -> None:
        features = ["extents", "zero", "flush", "digest"]
        if self.image.lie.startswith("checksums"):  # without, it is verified in other ways
            features.append("checksum")
        limits = {"max_readers": 4, "max_writers": 2, "unix_socket": None}
        self.answer(200, {"features": features, **limits}, Allow="GET, HEAD, PUT, PATCH, OPTIONS")

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(SIZE))
        self.end_headers()

    def do_GET(self) -> None:
        if self.unknown():
            return
        path, _, query = self.path.partition("?")
        if path.endswith("/extents"):
            self.list(query)
            return
        if path.endswith("/checksum"):
            self.checksum(dict(part.split("=") for part in query.split("&")))
            return
        text = self.headers.get("Range")
        if text is None or (self.headers.get("If-Range") and self.image.lie != "If-Range matches"):
            self.answer(200, bytes(self.image.bytes))
            return
        match = re.fullmatch(r"bytes=(?:([0-9]+)-([0-9]+)?|-([1-9][0-9]*))", text)
        if match is None:
            self.refuse(500 if self.image.lie == "malformed ranges fail" else 400)
            return
        self.part(*match.groups())

    def part(self, first: str | None, last: str | None, suffix: str | None) -> None:
        lie = self.image.lie
        start = max(0, SIZE - int(suffix)) if suffix else int(first or 0)
        stop = min(int(last) + 1, SIZE) if last else SIZE
        if start >= SIZE:
            self.refuse(500 if lie == "beyond is 500" else 416, Content_Range=f"bytes */{SIZE}")
            return
        if last and int(last) + 1 > SIZE and lie == "clipping is wrong":
            stop -= 1
        data = bytes(self.image.bytes[start:stop])
        if (suffix and lie == "suffixes are wrong") or (
            first and not last and lie == "open ends are wrong"
        ):
            data = data[1:] + b"?"
        if lie == "single bytes are wrong" and len(data) == 1:
            data = b"?"
        status = 200 if lie == "conditions count" and self.headers.get("If-None-Match") else 206
        if lie == "many readers fail" and len(data) == SIZE:
            self.image.reads += 1
            status = 500 if self.image.reads > 2 else 206
        total = SIZE + (lie == "the size in Content-Range is wrong")
        self.answer(status, data, Content_Range=f"bytes {start}-{stop - 1}/{total}")

    def checksum(self, asked: dict[str, str]) -> None:
        start = int(asked["start"])
        if self.image.lie == "checksums of whole images":
            start = 0
        if start >= SIZE:
            self.refuse(416)
            return
        data = self.image.bytes[start : start + int(asked["length"])]
        if self.image.lie == "checksums are wrong":
            data = data[1:]
        told = hashlib.sha256(hashlib.sha256(data).digest()).hexdigest()
        self.answer(200, {"algorithm": "sha256", "block_size": 4 << 20, "checksum": told})

    def list(self, query: str) -> None:
        fields = dict(part.split("=") for part in query.split("&"))
        if fields.get("context", "zero") not in {"zero", "dirty"}:
            self.refuse(500 if self.image.lie == "contexts fail" else 400)
            return
        start = int(fields.get("start", 0))
        stop = start + int(fields.get("length", SIZE))
        if self.image.lie == "spans are too long" and "start" in fields:
            stop += 1
        dirty = fields.get("context") == "dirty"
        found = self.image.extents(start, min(stop, SIZE), dirty=dirty)
        if self.image.lie == ("dirty extents have a gap" if dirty else "extents have a gap"):
            del found[1]
        if self.image.lie == "extents end early":
            del found[-1]
        self.answer(200, found)

    def handle_expect_100(self) -> bool:
        if self.image.lie == "busy for a moment" and not self.image.was_busy:
            self.image.was_busy = True
            self.refuse(409, Connection="close")
            return False
        return super().handle_expect_100()

    def do_PUT(self) -> None:
        if self.unknown():
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match = re.fullmatch(r"bytes ([0-9]+)-([0-9]+)/\*", self.headers["Content-Range"])
        assert match is not None
        flush = "flush=y" in self.path
        told = self.headers.get("Content-Digest")
        made = base64.b64encode(hashlib.sha256(body).digest()).decode()
        if told in {None, f"sha-256=:{made}:"} or self.image.lie == "digests mean nothing":
            self.write(int(match[1]), body, flush)
            return
        self.image.bytes[int(match[1]) : int(match[1]) + len(body)] = body
        self.refuse(400)

    def write(self, start: int, body: bytes, flush: bool) -> None:
        lie = self.image.lie
        if lie == "writes go elsewhere":
            start = max(0, start - 1)
        self.image.bytes[start : start + len(body)] = body
        flushed = {"flushed": flush and lie != "nothing is flushed"} if flush else {}
        self.answer(200, {"ok": True, **flushed})

    def do_PATCH(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Type"] != "application/json":
            match = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", self.headers["Range"])
            assert match is not None
            lie = self.image.lie == "PATCH does nothing right"
            self.write(int(match[1]), body[::-1] if lie else body, flush=False)
            return
        command = json.loads(body)
        if command["op"] == "flush" and self.image.lie == "flush fails":
            self.refuse(500)
            return
        if command["op"] == "zero" and self.image.lie == "too much is zeroed":
            command["size"] += 1
        if command["op"] == "zero":
            start, stop = command["offset"], command["offset"] + command["size"]
            self.image.bytes[start:stop] = bytes(stop - start)
        self.answer(200, {"ok": True})

    def do_PROPFIND(self) -> None:
        status = 200 if self.image.lie == "every method is known" else 405
        self.refuse(status, Allow="GET")


@contextlib.contextmanager
def liar(lie: str) -> Iterator[str]:
    """Serve the image; yield its URL."""
    handler = type("Handler", (_Handler,), {"image": Image(lie)})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/images/x"
        finally:
            server.shutdown()
            thread.join()
