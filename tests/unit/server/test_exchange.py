# SPDX-License-Identifier: Apache-2.0
"""One request and its answer over a socket pair: framing, versions, what applications see."""

import json
import select
from typing import Any

import pytest

from imageserver.core.errors import ClientGone
from imageserver.images.probing import Asking, WouldWait
from imageserver.web.body import ASKING, ZERO_COPY
from imageserver.web.requests import AFTERWARDS
from tests.unit.exchanges import App, Line, put

# Framing


def test_an_answer_of_known_length_is_sent_as_it_is(line: Line) -> None:
    assert line.ask(App(pieces=(b"a", memoryview(b"bc"))))

    first, headers, body = line.answer()
    assert (first, body) == ("HTTP/1.1 200 OK", b"abc")
    assert headers.keys() == {"Server", "Date", "Connection", "Content-Length"}
    assert (headers["Server"], headers["Connection"]) == ("imageserver", "keep-alive")


def test_an_answer_of_unknown_length_is_chunked(line: Line) -> None:
    assert line.ask(App(headers=[], pieces=(b"a" * 26, b"", memoryview(b"bc"))))

    _, headers, body = line.answer()
    assert headers["Transfer-Encoding"] == "chunked"
    assert body == b"1A\r\n" + b"a" * 26 + b"\r\n2\r\nbc\r\n0\r\n\r\n"


def test_an_answer_of_unknown_length_ends_an_http_1_0_connection(line: Line) -> None:
    assert not line.ask(App(headers=[]), "GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")

    _, headers, body = line.answer()
    assert (headers["Connection"], body) == ("close", b"abc")
    assert "Transfer-Encoding" not in headers


@pytest.mark.parametrize("pieces", [(), (b"abc",), (b"",)])
def test_an_answer_to_head_has_headers_only(line: Line, pieces: tuple[bytes, ...]) -> None:
    assert line.ask(App(pieces=pieces), "HEAD /x HTTP/1.1\r\nHost: x\r\n\r\n")

    _, headers, body = line.answer()
    assert (headers["Content-Length"], body) == ("3", b"")


def test_an_empty_answer_has_its_head(line: Line) -> None:
    assert line.ask(App(headers=[("Content-Length", "0")], pieces=()))

    assert line.answer()[2] == b""


def test_an_answer_without_content_has_no_length(line: Line) -> None:
    assert line.ask(App(status="204 No Content", headers=[], pieces=()))

    first, headers, body = line.answer()
    assert (first, body) == ("HTTP/1.1 204 No Content", b"")
    assert headers.keys().isdisjoint({"Content-Length", "Transfer-Encoding"})


# What the client need not wait for


@pytest.mark.parametrize("is_gone", [False, True])
def test_what_is_for_afterwards_is_done_once_the_answer_is_sent(line: Line, is_gone: bool) -> None:
    arrived: list[bool] = []

    def look(environ: dict[str, Any]) -> None:
        environ[AFTERWARDS].append(
            lambda: arrived.append(bool(select.select([line.client], [], [], 0)[0]))
        )

    if is_gone:
        line.client.close()
        line.client = line.conn.sock  # which has nothing to read but the end
        with pytest.raises(ClientGone):
            line.ask(App(look=look, pieces=[b"abc"]))
    else:
        assert line.ask(App(look=look, pieces=[b"abc"]))

    assert arrived == [True]


# Probes that have to wait


def test_a_probe_that_would_wait_is_left_as_it_came(line: Line) -> None:
    def look(environ: dict[str, Any]) -> None:
        if environ[ASKING] is Asking.ELSEWHERE:
            raise WouldWait

    app = App(look=look)
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
def test_no_version_is_spoken_but_our_own(line: Line, version: str, spoken: str) -> None:
    line.ask(App(), f"GET /x HTTP/{version}\r\nHost: x\r\n\r\n")

    assert line.answer()[0] == f"HTTP/{spoken} 200 OK"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("", "Host header required"),
        ("Host: a\r\nHost: a\r\n", "invalid request head"),
        ("Host: a/b\r\n", "invalid Host header"),
    ],
)
def test_a_host_that_will_not_do_is_400(line: Line, fields: str, message: str) -> None:
    assert not line.ask(App(), f"GET /x HTTP/1.1\r\n{fields}\r\n")

    first, headers, body = line.answer()
    assert (first, headers["Connection"]) == ("HTTP/1.1 400 Bad Request", "close")
    assert json.loads(body) == {"error": message}


# What the application sees


def test_the_environ_has_what_the_application_counts_on(line: Line) -> None:
    app = App()
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


def test_the_body_is_what_came_with_the_head_and_after(line: Line) -> None:
    app = App(look=lambda environ: environ["wsgi.input"].read())
    line.client.sendall(b"cdef")

    assert line.ask(app, put(6) + "ab")
    assert app.seen == b"abcdef"


def test_a_pipelined_request_is_left_for_next_time(line: Line) -> None:
    app = App(look=lambda environ: environ["wsgi.input"].read())
    following = "GET /y HTTP/1.1\r\nHost: x\r\n\r\n"

    assert line.ask(app, put(2) + "ab" + following)
    assert (app.seen, line.conn.buffer) == (b"ab", following.encode())
    assert line.ask(app, "")
    assert (app.environ["RAW_URI"], line.conn.buffer, line.conn.requests) == ("/y", b"", 2)


def test_continue_is_sent_when_the_application_reads(line: Line) -> None:
    line.client.sendall(b"ab")
    app = App(look=lambda environ: environ["wsgi.input"].read())

    assert line.ask(app, put(2, "Expect: 100-continue\r\n"))
    assert line.client.recv(1 << 20).startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_a_refused_upload_is_not_told_to_continue(line: Line) -> None:
    assert not line.ask(App(), put(2, "Expect: 100-continue\r\n"))

    first, headers, _ = line.answer()
    assert (first, headers["Connection"]) == ("HTTP/1.1 200 OK", "close")
