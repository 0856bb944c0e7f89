# SPDX-License-Identifier: Apache-2.0
"""A proxy before an image server that changes one bit of an image on its way."""

import contextlib
import http.client
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.system.threads import serving

#: Fields of a connection, and what the handler writes by itself.
_OURS = {"connection", "server", "date", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Flip:
    """The bit: its byte's offset in the image, and the method on whose way it changes."""

    offset: int
    method: str
    url: str = ""

    def flipped(self, method: str, said: str | None, body: bytes) -> bytes:
        """Return a body; ``said`` is where in the image it lies."""
        start = int((re.findall("[0-9]+", said or "") or [0])[0])
        at = self.offset - start
        if method != self.method or not said or not 0 <= at < len(body):
            return body
        return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


@contextlib.contextmanager
def flipping(url: str, offset: int, way: str) -> Iterator[Flip]:
    """Serve what is at a URL; digests are left out, so that nobody but its client notices."""
    server, _, path = url.removeprefix("http://").partition("/")
    flip = Flip(offset, way)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_args: object) -> None:
            pass

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = flip.flipped(self.command, self.headers.get("Content-Range"), body)
            fields = {
                name: value
                for name, value in self.headers.items()
                if name not in {"Content-Length", "Content-Digest"}
            }
            upstream = http.client.HTTPConnection(server)
            with contextlib.closing(upstream):
                upstream.request(self.command, self.path, body or None, fields)
                answer = upstream.getresponse()
                said = answer.getheader("Content-Range")
                data = flip.flipped(self.command, said, answer.read())
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in _OURS:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the client may have given up
                self.wfile.write(data)

    for method in ("OPTIONS", "HEAD", "GET", "PUT", "PATCH"):
        setattr(Handler, f"do_{method}", Handler.relay)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(listener):
        flip.url = f"http://127.0.0.1:{listener.server_port}/{path}"
        yield flip
