# SPDX-License-Identifier: Apache-2.0
"""Request heads that never reach the application: malformed, too long, too slow."""

import contextlib
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import read_answer
from tests.system.harness import Server

LINE = b"GET /images/x HTTP/1.1\r\n"

#: Heads as bytes, and their answers; None where any message will do.
HEADS: dict[str, tuple[bytes, int, str | None]] = {
    "garbage": (b"garbage\r\n\r\n", 400, "invalid request line"),
    "binary": (bytes(range(128, 256)) + b"\r\n\r\n", 400, None),
    "TLS client hello": (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00\r\n\r\n", 400, None),
    "raw non-ASCII target": (b"GET /images/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n", 400, None),
    "blank in target": (b"GET /images/a b HTTP/1.1\r\nHost: x\r\n\r\n", 400, None),
    "bad method": (b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "invalid method"),
    "method of no HTTP": (b"WEBSOCKET / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "invalid method"),
    "HTTP/3.0": (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 400, "unsupported HTTP version"),
    "no Host": (LINE + b"X: y\r\n\r\n", 400, "Host header required"),
    "two Hosts": (LINE + b"Host: x\r\nHost: x\r\n\r\n", 400, "invalid request head"),
    "Host with a path": (LINE + b"Host: x/y\r\n\r\n", 400, "invalid Host header"),
    "no such version": (b"GET / HTTX/1.1\r\nHost: x\r\n\r\n", 400, None),
    "long target": (b"GET /images/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, None),
    "endless target": (b"GET /images/" + b"a" * 70_000, 414, None),
    "long field": (LINE + b"X: " + b"a" * 9000 + b"\r\n\r\n", 431, "request head too large"),
    "many fields": (LINE + b"X: y\r\n" * 101 + b"\r\n", 431, "request head too large"),
    "endless fields": (LINE + b"X: y\r\n" * 12_000, 431, "request head too large"),
    "field without colon": (LINE + b"nonsense\r\n\r\n", 400, "invalid request head"),
    "folded field": (LINE + b"X: a\r\n b\r\n\r\n", 400, "invalid request head"),
    "blank before colon": (LINE + b"X : a\r\n\r\n", 400, "invalid request head"),
    "bare line feeds": (b"GET / HTTP/1.1\nHost: x\n\n", 400, None),
    "NUL in field": (LINE + b"X: a\0b\r\n\r\n", 400, "invalid request head"),
    "two lengths": (LINE + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, None),
    "length and chunked": (
        LINE + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
        None,
    ),
    "signed length": (LINE + b"Content-Length: +1\r\n\r\n", 400, "Invalid Content-Length"),
    "length with underscore": (
        LINE + b"Content-Length: 1_0\r\n\r\n",
        400,
        "Invalid Content-Length",
    ),
    "negative length": (LINE + b"Content-Length: -1\r\n\r\n", 400, "Invalid Content-Length"),
    "unknown coding": (LINE + b"Transfer-Encoding: gzop\r\n\r\n", 501, None),
    "unknown expectation": (LINE + b"Expect: miracles\r\n\r\n", 417, None),
}


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    (workplace / "image").write_bytes(b"image")
    with Server(workplace, client_timeout=1, workers=2) as running:
        running.add("x", backend="file", file=str(workplace / "image"))
        yield running


@pytest.mark.parametrize("name", HEADS)
def test_a_bad_head_is_answered_like_any_error_and_ends_the_connection(server, name):
    head, status, message = HEADS[name]
    with server.raw(head) as sock, sock.makefile("rb") as stream:
        answer = read_answer(stream)
        assert answer.refusal == (status, message or answer.error)
        assert answer.headers["Connection"] == "close"
        assert "Traceback" not in answer.error
        assert stream.read() == b""
    assert server.request("OPTIONS", "/images/x").status == 200


def test_the_good_request_before_a_bad_one_is_answered(server):
    good = LINE + b"Host: x\r\n\r\n"
    with server.raw(good + b"garbage\r\n\r\n" + good) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).body == b"image"
        assert read_answer(stream).refusal == (400, "invalid request line")
        assert stream.read() == b""


def seconds_until_408(server: Server, pieces: bytes, pause: float) -> float:
    """Send one piece every ``pause`` seconds until the answer comes; return how long that took."""
    began = time.monotonic()
    with server.raw() as sock, sock.makefile("rb") as stream:
        for piece in pieces:
            sock.sendall(bytes([piece]))
            if select.select([sock], [], [], pause)[0]:
                assert read_answer(stream).refusal == (408, "request head took too long")
                assert stream.read() == b""
                return time.monotonic() - began
    raise AssertionError("never cut off")


def test_a_head_slower_than_the_client_timeout_is_cut_off(server):
    assert 0.7 < seconds_until_408(server, b"G" + b"E" * 200, 0.05) < 2.5


def test_slow_heads_by_the_hundred_keep_nobody_from_being_answered(server):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(server.raw(b"GET /images/x HTTP/1.1\r\nHost"))
        began = time.monotonic()
        for _ in range(20):
            assert server.request("OPTIONS", "/images/x").status == 200
            assert server.request("GET", "/images/x").body == b"image"
        assert time.monotonic() - began < 5
