# SPDX-License-Identifier: Apache-2.0
"""imagectl upload and what servers answer to PUT: only what was taken as a whole is done."""

import http.server
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.moving import MIB, filled, imagectl
from tests.system.threads import serving

#: More than sockets hold: what is not read is noticed.
SIZE = 32 * MIB
FILE, DISK = "GET, HEAD, PUT, OPTIONS", "GET, HEAD, PUT, PATCH, OPTIONS"


class Taker(http.server.ThreadingHTTPServer):
    """Takes an image, or not: each PUT is left to the next of ``puts``, in the end the last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.methods = FILE
        self.puts: list[Callable[[_Handler, int], object]] = []
        self.asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/images/x"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Taker

    def log_message(self, *_arguments: object) -> None:
        pass

    def say(self, fields: object, length: int | None = None, **headers: str) -> None:
        body = b"" if length else json.dumps(fields).encode()
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_OPTIONS(self) -> None:
        self.say({"max_writers": 1}, Allow=self.server.methods)

    def do_HEAD(self) -> None:
        self.say(None, SIZE)

    def do_PUT(self) -> None:
        self.server.asked += 1
        put = self.server.puts.pop(0) if len(self.server.puts) > 1 else self.server.puts[0]
        put(self, int(self.headers["Content-Length"]))


def early(handler: _Handler, _length: int) -> None:
    """Say that all is well, read nothing, hang up."""
    handler.say({})
    handler.connection.shutdown(socket.SHUT_WR)
    handler.close_connection = True


def takes(answer: object) -> Callable[[_Handler, int], object]:
    """Read all of it, and answer so."""

    def put(handler: _Handler, length: int) -> None:
        while length:
            length -= len(handler.rfile.read(min(MIB, length)))
        handler.say(answer)

    return put


@pytest.fixture
def taker() -> Iterator[Taker]:
    server = Taker()
    with serving(server):
        yield server


@pytest.fixture(scope="module")
def image(workplace: Path) -> Iterator[Path]:
    path = filled(workplace / "written.raw", SIZE, (0, SIZE))
    yield path
    path.unlink()


@pytest.mark.parametrize("methods", [FILE, DISK], ids=["file", "disk"])
def test_an_answer_before_the_body_was_taken_is_none(taker: Taker, image: Path, methods: str):
    taker.methods, taker.puts = methods, [early]
    said = imagectl("upload", image, taker.url, "-q", "--patience", 0, status=1).stderr
    sentence = f"imagectl: 127.0.0.1:{taker.server_port} answered PUT before it had taken all bytes"
    assert said.startswith(sentence)


@pytest.mark.parametrize("methods", [FILE, DISK], ids=["file", "disk"])
def test_what_was_answered_too_early_is_sent_again(taker: Taker, image: Path, methods: str):
    taker.methods, taker.puts = methods, [early, takes({"ok": True, "bytes_written": SIZE})]
    imagectl("upload", image, taker.url)
    assert taker.asked == 2


@pytest.mark.parametrize("taken", [0, SIZE - 1, None, "all"], ids=str)
def test_a_server_that_took_less_has_failed(taker: Taker, image: Path, taken: object):
    taker.puts = [takes({"ok": True, "bytes_written": taken})]
    assert imagectl("upload", image, taker.url, "-q", status=1).stderr == (
        f"imagectl: 127.0.0.1:{taker.server_port} was sent {SIZE} bytes and took {taken}; "
        "if the server writes it in place (a block device), it may be part old, part new\n"
    )
    assert taker.asked == 1


@pytest.mark.parametrize(
    ("answer", "options", "flushed"),
    [
        ({"ok": True, "flushed": False}, (), False),
        ({"ok": True, "flushed": True}, ("--no-flush",), True),
        ({"ok": True, "flushed": "yes"}, (), True),
        ({"ok": True}, ("--no-flush",), False),
    ],
    ids=str,
)
def test_the_server_tells_whether_it_has_flushed(
    taker: Taker, image: Path, answer: object, options: tuple[str, ...], flushed: bool
):
    taker.puts = [takes(answer)]
    done = json.loads(imagectl("upload", image, taker.url, "-q", "--json", *options).stdout)
    assert (done["size"], done["flushed"]) == (SIZE, flushed)
