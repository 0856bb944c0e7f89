# SPDX-License-Identifier: Apache-2.0
"""Servers whose image, extents and manners change as a test wants, while imagectl asks them."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.system.harness import repeatable
from tests.system.moving import MIB, imagectl
from tests.system.threads import serving

SIZE = 8 * MIB
OLD, NEW = (repeatable(name).randbytes(SIZE) for name in ("old", "new"))


@dataclass
class Liar:
    """A server of ``data`` that breaks connections once ``allowed`` bytes have gone."""

    data: bytes
    extents: list[dict[str, object]] = field(default_factory=list)
    allowed: int = 1 << 40
    #: Called before a range is answered, with its start.
    hook: Callable[[int], object] = lambda _start: None
    url: str = ""

    def only(self, count: int) -> None:
        """Break off after so many bytes."""
        self.allowed = count


def extents(*spans: tuple[int, int], size: int = SIZE, dirty: bool = False, zero: bool = False):
    """Extents of data in these spans; with ``dirty`` of changes, of zeros if ``zero``."""
    said, position = [], 0
    for start, stop in [*spans, (size, size)]:
        for first, last, hit in ((position, start, False), (start, stop, True)):
            if first < last:
                is_zero = zero and hit if dirty else not hit
                fields = {"zero": is_zero, "dirty": hit and dirty}
                said.append({"start": first, "length": last - first, **fields})
        position = stop
    return said


@contextlib.contextmanager
def liars() -> Iterator[Callable[..., Liar]]:
    """Yield what starts servers, which end with the block; spans are of data, or of changes."""
    with contextlib.ExitStack() as ending:

        def start(data: bytes, *spans: tuple[int, int], dirty: bool = False) -> Liar:
            liar = Liar(data, extents(*(spans or [(0, len(data))]), size=len(data), dirty=dirty))
            listener = ThreadingHTTPServer(("127.0.0.1", 0), handler(liar))
            ending.enter_context(serving(listener))
            liar.url = f"http://127.0.0.1:{listener.server_port}/images/x"
            return liar

        yield start


def handler(liar: Liar) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if status == 206:
                self.close_connection = liar.allowed < len(body)
                body = body[: liar.allowed]
                liar.allowed -= len(body)  # before the client can ask on another connection
            self.wfile.write(body)

        def do_OPTIONS(self) -> None:
            self.answer(200, b'{"features":["extents"],"max_readers":4}', Allow="GET")

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(liar.data)))
            self.end_headers()

        def do_GET(self) -> None:
            if "/extents" in self.path:
                self.answer(200, json.dumps(liar.extents).encode())
                return
            first, last = re.findall("[0-9]+", self.headers["Range"])
            liar.hook(int(first))
            body = liar.data[int(first) : int(last) + 1]
            self.answer(206, body, Content_Range=f"bytes {first}-{last}/{len(liar.data)}")

    return Handler


def broken_off(liar: Liar, copy: Path, *options: object, after: int = 4 * MIB) -> None:
    """Download until the server goes away."""
    liar.only(after)
    imagectl("download", liar.url, copy, "-n", 1, "--patience", 0, *options, status=1)
    liar.only(1 << 40)
