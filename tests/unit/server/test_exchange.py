# SPDX-License-Identifier: Apache-2.0
"""One request and its answer over a socket pair: framing, keep-alive, and every way to break."""

import contextlib
import json
import select
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from gunicorn.config import Config

from imageserver.core.errors import ClientGone
from imageserver.images.probing import Asking, WouldWait
from imageserver.server.connection import Connection
from imageserver.server.environ import Gateway
from imageserver.server.exchange import cut, serve
from imageserver.server.wire import Wire
from imageserver.web.body import ASKING, ZERO_COPY
from imageserver.web.requests import IS_GONE

OK = "200 OK"


@dataclass
class _App:
    """A WSGI application that answers as told and remembers its environment."""

    status: str = OK
    headers: list[tuple[str, str]] = field(default_factory=lambda: [("Content-Length", "3")])
    pieces: Iterable[bytes | memoryview] = (b"abc",)
    look: Callable[[dict[str, Any]], object] = lambda _: None
    environ: dict[str, Any] = field(default_factory=dict)
    seen: object = None

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes | memoryview]:
        self.environ = environ
        self.seen = self.look(environ)
        start_response(self.status, self.headers)
        return self.pieces


class _Line:
    """A connection, our end as the server has it, and the client's."""

    def __init__(self, ours: socket.socket, client: socket.socket) -> None:
        self.conn = Connection(ours, ("192.0.2.1", 4321), ("127.0.0.1", 80))
        self.client = client
        cfg = Config()
        cfg.set("http_parser", "python")
        self.gateway = Gateway(cfg)

    def ask(
        self, app: _App, head: str | bytes = "GET /x HTTP/1.1\r\nHost: x\r\n\r\n", **flags: Any
    ) -> bool:
        self.conn.buffer += head if isinstance(head, bytes) else head.encode()
        wire = Wire(self.conn.sock, 5.0)
        last, asking = flags.get("last", False), flags.get("asking", Asking.NOW)
        return serve(self.conn, wire, app, self.gateway, lambda: last, asking=asking)

    def answer(self) -> tuple[str, dict[str, str], bytes]:
        """Return status line, headers and body of what has been sent, whatever its framing."""
        assert select.select([self.client], [], [], 0)[0]
        head, _, body = self.client.recv(1 << 20).partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        return first, dict(line.split(": ", 1) for line in lines), body


@pytest.fixture
def line() -> Iterator[_Line]:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    theirs.settimeout(5)
    with ours, theirs:
        yield _Line(ours, theirs)


def _put(length: int, extra: str = "") -> str:
    return f"PUT /x HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{extra}\r\n"


# Framing


def test_an_answer_of_known_length_is_sent_as_it_is(line: _Line) -> None:
    assert line.ask(_App(pieces=(b"a", memoryview(b"bc"))))

    first, headers, body = line.answer()
    assert (first, body) == ("HTTP/1.1 200 OK", b"abc")
    assert headers.keys() == {"Server", "Date", "Connection", "Content-Length"}
    assert (headers["Server"], headers["Connection"]) == ("imageserver", "keep-alive")


def test_an_answer_of_unknown_length_is_chunked(line: _Line) -> None:
    assert line.ask(_App(headers=[], pieces=(b"a" * 26, b"", memoryview(b"bc"))))

    _, headers, body = line.answer()
    assert headers["Transfer-Encoding"] == "chunked"
    assert body == b"1A\r\n" + b"a" * 26 + b"\r\n2\r\nbc\r\n0\r\n\r\n"


def test_an_answer_of_unknown_length_ends_an_http_1_0_connection(line: _Line) -> None:
    assert not line.ask(_App(headers=[]), "GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")

    _, headers, body = line.answer()
    assert (headers["Connection"], body) == ("close", b"abc")
    assert "Transfer-Encoding" not in headers


@pytest.mark.parametrize("pieces", [(), (b"abc",), (b"",)])
def test_an_answer_to_head_has_headers_only(line: _Line, pieces: tuple[bytes, ...]) -> None:
    assert line.ask(_App(pieces=pieces), "HEAD /x HTTP/1.1\r\nHost: x\r\n\r\n")

    _, headers, body = line.answer()
    assert (headers["Content-Length"], body) == ("3", b"")


def test_an_empty_answer_has_its_head(line: _Line) -> None:
    assert line.ask(_App(headers=[("Content-Length", "0")], pieces=()))

    assert line.answer()[2] == b""


def test_an_answer_without_content_has_no_length(line: _Line) -> None:
    assert line.ask(_App(status="204 No Content", headers=[], pieces=()))

    first, headers, body = line.answer()
    assert (first, body) == ("HTTP/1.1 204 No Content", b"")
    assert headers.keys().isdisjoint({"Content-Length", "Transfer-Encoding"})


# Clients that take nothing


def _fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(4096))


@pytest.mark.parametrize("pieces", [(b"abc",), [b"a", b"bc"]], ids=["one piece", "two pieces"])
def test_an_answer_that_is_complete_never_waits_for_its_client(
    line: _Line, pieces: Iterable[bytes]
) -> None:
    _fill(line.conn.sock)

    assert line.ask(_App(pieces=pieces))
    head, _, body = line.conn.unsent.partition(b"\r\n\r\n")
    assert (head[:15], body) == (b"HTTP/1.1 200 OK", b"abc")


def test_what_the_client_takes_of_an_answer_is_sent_at_once(line: _Line) -> None:
    body = bytes(range(256)) * 16384
    app = _App(headers=[("Content-Length", str(len(body)))], pieces=[body])

    assert line.ask(app)
    with contextlib.suppress(BlockingIOError):
        line.client.setblocking(False)
        taken = b""
        while piece := line.client.recv(1 << 20):
            taken += piece
    assert (taken + line.conn.unsent).endswith(b"\r\n\r\n" + body)
    assert len(line.conn.unsent) < len(body)


@pytest.mark.parametrize(
    ("head", "app"),
    [
        pytest.param("garbage\r\n\r\n", _App(), id="bad-head"),
        pytest.param("GET /x HTTP/1.1\r\nHost: x\r\n\r\n", _App(look=lambda _: 1 // 0), id="bug"),
    ],
)
def test_a_refusal_never_waits_for_its_client(line: _Line, head: str, app: _App) -> None:
    _fill(line.conn.sock)

    assert not line.ask(app, head)
    assert line.conn.unsent.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 500 "))


def test_a_complete_answer_of_the_wrong_length_is_an_error_of_ours(line: _Line) -> None:
    assert not line.ask(_App(pieces=[b"ab"]))

    assert line.answer()[0] == "HTTP/1.1 500 Internal Server Error"


# Probes that have to wait


def test_a_probe_that_would_wait_is_left_as_it_came(line: _Line) -> None:
    def look(environ: dict[str, Any]) -> None:
        if environ[ASKING] is Asking.ELSEWHERE:
            raise WouldWait

    app = _App(look=look)
    received = b"HEAD /x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nabGET /y HTTP/1.1\r\n"
    with pytest.raises(WouldWait):
        line.ask(app, received, asking=Asking.ELSEWHERE)
    assert (line.conn.buffer, line.conn.requests, line.conn.unsent) == (received, 0, b"")
    assert not select.select([line.client], [], [], 0)[0]

    assert line.ask(app, b"")
    assert line.answer()[0] == "HTTP/1.1 200 OK"
    assert line.conn.buffer == b"GET /y HTTP/1.1\r\n"


# Versions and hosts


@pytest.mark.parametrize(
    ("version", "spoken"), [("1.0", "1.0"), ("1.1", "1.1"), ("1.2", "1.1"), ("1.9", "1.1")]
)
def test_no_version_is_spoken_but_our_own(line: _Line, version: str, spoken: str) -> None:
    line.ask(_App(), f"GET /x HTTP/{version}\r\nHost: x\r\n\r\n")

    assert line.answer()[0] == f"HTTP/{spoken} 200 OK"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("", "Host header required"),
        ("Host: a\r\nHost: a\r\n", "invalid request head"),
        ("Host: a/b\r\n", "invalid Host header"),
    ],
)
def test_a_host_that_will_not_do_is_400(line: _Line, fields: str, message: str) -> None:
    assert not line.ask(_App(), f"GET /x HTTP/1.1\r\n{fields}\r\n")

    first, headers, body = line.answer()
    assert (first, headers["Connection"]) == ("HTTP/1.1 400 Bad Request", "close")
    assert json.loads(body) == {"error": message}


# What the application sees


def test_the_environ_has_what_the_application_counts_on(line: _Line) -> None:
    app = _App()
    line.ask(app, "GET /images/a%20b?context=zero HTTP/1.1\r\nHost: x\r\nRange: bytes=0-1\r\n\r\n")

    expected = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/images/a b",
        "RAW_URI": "/images/a%20b?context=zero",
        "QUERY_STRING": "context=zero",
        "HTTP_RANGE": "bytes=0-1",
        "REMOTE_ADDR": "192.0.2.1",
        "wsgi.url_scheme": "http",
        "wsgi.multithread": True,
        ZERO_COPY: True,
    }
    assert {name: app.environ[name] for name in expected} == expected


def test_the_body_is_what_came_with_the_head_and_after(line: _Line) -> None:
    app = _App(look=lambda environ: environ["wsgi.input"].read())
    line.client.sendall(b"cdef")

    assert line.ask(app, _put(6) + "ab")
    assert app.seen == b"abcdef"


def test_a_pipelined_request_is_left_for_next_time(line: _Line) -> None:
    app = _App(look=lambda environ: environ["wsgi.input"].read())
    following = "GET /y HTTP/1.1\r\nHost: x\r\n\r\n"

    assert line.ask(app, _put(2) + "ab" + following)
    assert (app.seen, line.conn.buffer) == (b"ab", following.encode())
    assert line.ask(app, "")
    assert (app.environ["RAW_URI"], line.conn.buffer, line.conn.requests) == ("/y", b"", 2)


def test_continue_is_sent_when_the_application_reads(line: _Line) -> None:
    line.client.sendall(b"ab")
    app = _App(look=lambda environ: environ["wsgi.input"].read())

    assert line.ask(app, _put(2, "Expect: 100-continue\r\n"))
    assert line.client.recv(1 << 20).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_a_refused_upload_is_not_told_to_continue(line: _Line) -> None:
    assert not line.ask(_App(), _put(2, "Expect: 100-continue\r\n"))

    first, headers, _ = line.answer()
    assert (first, headers["Connection"]) == ("HTTP/1.1 200 OK", "close")


# How connections end


def test_a_connection_is_kept_if_its_unread_body_is_there_whole(line: _Line) -> None:
    assert line.ask(_App(), _put(2) + "abGET /y")

    assert line.answer()[1]["Connection"] == "keep-alive"
    assert line.conn.buffer == b"GET /y"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(_put(3) + "ab", id="unread-body"),
        pytest.param(
            "PUT /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            id="chunked",
        ),
        pytest.param("GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", id="close"),
        pytest.param("GET /x HTTP/1.0\r\n\r\n", id="http-1.0"),
    ],
)
def test_a_connection_that_cannot_go_on_says_so(line: _Line, head: str) -> None:
    assert not line.ask(_App(), head)

    assert line.answer()[1]["Connection"] == "close"


def test_the_last_answer_of_a_worker_ends_the_connection(line: _Line) -> None:
    assert not line.ask(_App(), last=True)

    assert line.answer()[1]["Connection"] == "close"


# How answers break


class _Closing:
    """Pieces that know whether they were closed."""

    def __init__(self, *pieces: bytes, then: BaseException | None = None) -> None:
        self._pieces, self._then = pieces, then
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._then:
            raise self._then

    def close(self) -> None:
        self.closed += 1


def test_the_answers_pieces_are_closed(line: _Line) -> None:
    pieces = _Closing(b"abc")
    line.ask(_App(pieces=pieces))

    assert pieces.closed == 1


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(_Closing(b"a", then=RuntimeError("bug")), id="failing"),
        pytest.param(_Closing(b"a", then=ClientGone()), id="client-gone"),
        pytest.param(_Closing(b"a"), id="too-short"),
        pytest.param(_Closing(b"abc", b"d"), id="too-long"),
    ],
)
def test_an_answer_that_breaks_after_its_first_byte_is_cut_and_closed(
    line: _Line, pieces: _Closing
) -> None:
    with pytest.raises(ClientGone):
        line.ask(_App(pieces=pieces))
    assert pieces.closed == 1


def test_a_chunked_answer_that_breaks_lacks_its_end(line: _Line) -> None:
    with pytest.raises(ClientGone):
        line.ask(_App(headers=[], pieces=_Closing(b"abc", then=RuntimeError("bug"))))

    assert line.answer()[2] == b"3\r\nabc\r\n"


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(_App(look=lambda _: 1 // 0), id="before-the-answer"),
        pytest.param(_App(pieces=_Closing(then=RuntimeError("/secret"))), id="before-a-byte"),
        pytest.param(_App(headers=[("X", "a\r\nb")]), id="header-with-line-break"),
    ],
)
def test_an_application_that_fails_before_the_first_byte_is_answered_for(
    line: _Line, app: _App
) -> None:
    assert not line.ask(app)

    first, headers, body = line.answer()
    assert (first, headers["Connection"]) == ("HTTP/1.1 500 Internal Server Error", "close")
    assert json.loads(body) == {"error": "internal error"}


def test_a_client_that_vanishes_before_the_answer_gets_none(line: _Line) -> None:
    def vanish(_: object) -> None:
        raise ClientGone

    with pytest.raises(ClientGone):
        line.ask(_App(look=vanish))
    assert not select.select([line.client], [], [], 0)[0]


def test_a_cut_connection_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    cut(ours)
    ours.close()

    with client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_cutting_a_closed_connection_is_harmless() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    theirs.close()

    cut(ours)


# Whether the client is still there


def test_the_application_may_look_for_the_client_until_its_answer_begins(line: _Line) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"a"
        assert not app.environ[IS_GONE]()
        yield b"bc"

    app = _App(look=lambda environ: environ[IS_GONE](), pieces=pieces())
    line.client.shutdown(socket.SHUT_WR)
    line.ask(app)

    assert app.seen is False
    asked, _, answer = line.client.recv(1 << 20).partition(b"\r\n\r\n")
    assert asked == b"HTTP/1.1 100 Continue"
    assert (answer.count(b"HTTP/1.1"), answer[-3:]) == (1, b"abc")


def test_the_application_hears_that_the_client_has_gone(line: _Line) -> None:
    app = _App(look=lambda environ: environ[IS_GONE]())
    line.client.close()

    with contextlib.suppress(ClientGone):
        line.ask(app)
    assert app.seen is True
