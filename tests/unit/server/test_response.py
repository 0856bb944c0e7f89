# SPDX-License-Identifier: Apache-2.0
"""Heads of answers, compared with what gunicorn sends for the same status and headers."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http.wsgi import Response

from imageserver.server.request import HeadRules, ImageRequest, _HeadReader
from imageserver.server.response import ImageResponse

Headers = Sequence[tuple[str, str]]


class _Sent(list[bytes]):
    """A socket that keeps what is sent."""

    def sendall(self, data: bytes) -> None:
        self.append(data)


def _request(method: str, version: str) -> ImageRequest:
    cfg = Config()
    cfg.set("http_parser", "python")
    head = f"{method} / HTTP/{version}\r\nHost: h\r\nConnection: keep-alive\r\n\r\n".encode()
    return ImageRequest(HeadRules(cfg), _HeadReader(head), ("192.0.2.1", 1), 1)


def _ours(req: ImageRequest, *, left: int = 0) -> tuple[ImageResponse, list[bytes]]:
    body: Any = SimpleNamespace(left=left, discard_early=lambda: None)
    resp = ImageResponse(req, body, lambda: None, is_last=lambda: False, begins=lambda: None)
    return resp, resp.collect()


def _theirs(req: ImageRequest, status: str, headers: Headers) -> bytes:
    sent = _Sent()
    resp = Response(req, sent, Config())
    resp.version = "imageserver"
    resp.start_response(status, headers)
    resp.send_headers()
    return b"".join(sent)


def _without_date(head: bytes) -> list[bytes]:
    return [line for line in head.split(b"\r\n") if not line.startswith(b"Date: ")]


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "CONNECT"])
@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "206 x", "304 x", "404 x", "103 x"])
@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Length", "3"), ("X-One", " a\t"), ("x-two", "b"), ("X-One", "\xe9")],
        [("Server", "x"), ("Date", "y"), ("Connection", "close"), ("Keep-Alive", "z"), ("A", "")],
    ],
)
def test_a_head_is_what_gunicorn_would_send(
    method: str, version: str, status: str, headers: Headers
) -> None:
    req = _request(method, version)
    resp, sent = _ours(req)
    resp.start_response(status, headers)
    resp.write(b"")

    assert _without_date(b"".join(sent)) == _without_date(_theirs(req, status, headers))


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        ("200 OK", [("X", "a\r\nY: b")]),
        ("200 OK", [("X", "a\nb")]),
        ("200 OK", [("X", "a\r\n")]),
        ("200 OK", [("X: y\r\nZ", "b")]),
        ("200 OK", [("X y", "b")]),
        ("200 OK", [("", "b")]),
        ("200 OK", [("X", "a\0")]),
        ("200 OK", [("X", "\u2026")]),
        ("200 OK", [("Content-Length", "many")]),
        ("200 OK\r\nX: y", []),
        ("20 OK", []),
        ("OK", []),
    ],
)
def test_what_would_split_or_garble_a_head_is_refused(status: str, headers: Headers) -> None:
    resp, sent = _ours(_request("GET", "1.1"))

    with pytest.raises(ValueError, match="invalid"):
        resp.start_response(status, headers)
    assert not sent


def test_a_header_that_is_no_text_is_refused() -> None:
    resp, _ = _ours(_request("GET", "1.1"))
    wrong: Any = [("X", 1)]

    with pytest.raises((TypeError, AttributeError)):
        resp.start_response("200 OK", wrong)


def test_an_answer_begins_once_and_may_begin_anew_until_it_is_sent() -> None:
    resp, sent = _ours(_request("GET", "1.1"))
    error = ValueError("late")
    resp.start_response("200 OK", [("Content-Length", "3")])

    with pytest.raises(RuntimeError):
        resp.start_response("200 OK", [])
    resp.start_response("500 x", [], (ValueError, error, None))  # type: ignore[arg-type]
    resp.write(b"abc")
    with pytest.raises(ValueError, match="late"):
        resp.start_response("500 x", [], (ValueError, error, None))  # type: ignore[arg-type]
    assert sent[0].startswith(b"HTTP/1.1 500 x\r\n")
    assert sent[1:] == [b"3\r\n", b"abc", b"\r\n"]


def test_an_answer_without_a_status_is_a_defect() -> None:
    resp, _ = _ours(_request("GET", "1.1"))

    with pytest.raises(RuntimeError):
        resp.finish()


def test_a_body_left_unread_ends_the_connection_with_the_answer() -> None:
    resp, sent = _ours(_request("PUT", "1.1"), left=1)
    resp.start_response("200 OK", [("Content-Length", "0")])
    resp.finish()

    assert b"\r\nConnection: close\r\n" in sent[0]
    assert resp.should_close()
