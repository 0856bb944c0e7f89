# SPDX-License-Identifier: Apache-2.0
"""What we count on of gunicorn's inside: a release that changes any of it fails here, by name.

The list is in the docstring of ``server/exchange.py``; the master and the worker add to it below.
"""

import inspect
import itertools
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn import config
from gunicorn.http import errors, message
from gunicorn.http.body import ChunkedReader, LengthReader
from gunicorn.http.message import Request
from gunicorn.http.unreader import Unreader

from imageserver.server.connection import Connection
from imageserver.server.environ import Gateway
from imageserver.server.exchange import _HEAD_ERRORS, serve
from imageserver.server.request import HeadRules, ImageRequest, _HeadReader
from imageserver.server.wire import REASONS, Wire

PEER = ("192.0.2.1", 4321)
GET = b"GET /images/a%2Fb?q=1 HTTP/1.1\r\nHost: h\r\n\r\n"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def cfg() -> config.Config:
    cfg = config.Config()
    cfg.set("http_parser", "python")
    return cfg


def _request(cfg: config.Config, head: bytes) -> tuple[Any, Unreader]:
    reader = _HeadReader(head)
    return Request(cfg, reader, PEER, 1), reader


# Request


def test_a_head_in_memory_is_parsed(cfg: config.Config) -> None:
    req, reader = _request(cfg, GET)

    assert (req.method, req.uri, req.query, req.version) == (
        "GET",
        "/images/a%2Fb?q=1",
        "q=1",
        (1, 1),
    )
    assert req.headers == [("HOST", "h")]
    assert reader.read() == b""


def test_the_reader_of_a_body_knows_its_length(cfg: config.Config) -> None:
    req, reader = _request(cfg, b"PUT / HTTP/1.1\r\nContent-Length: 7\r\n\r\nabc")

    assert (type(req.body.reader), req.body.reader.length) == (LengthReader, 7)
    assert reader.read() == b"abc"


def test_a_request_without_a_body_has_a_reader_of_length_zero(cfg: config.Config) -> None:
    req, _ = _request(cfg, GET)

    assert (type(req.body.reader), req.body.reader.length) == (LengthReader, 0)


def test_a_chunked_body_is_told_by_its_reader(cfg: config.Config) -> None:
    req, reader = _request(cfg, b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n")

    assert type(req.body.reader) is ChunkedReader
    assert reader.read() == b"1\r\n"


@pytest.mark.parametrize("expects", [False, True])
def test_whether_the_client_expects_a_continue_is_noted(cfg: config.Config, expects: bool) -> None:
    extra = b"Expect: 100-continue\r\n" if expects else b""
    req, _ = _request(cfg, b"PUT / HTTP/1.1\r\nContent-Length: 1\r\n" + extra + b"\r\n")

    assert req._expected_100_continue is expects


def test_a_head_that_is_cut_off_raises_no_more_data(cfg: config.Config) -> None:
    with pytest.raises(errors.NoMoreData):
        _request(cfg, b"GET / HTTP/1.1\r\nHost: h\r\n")


def test_the_reader_in_memory_overrides_what_a_request_asks_of_its_source() -> None:
    asked = set(re.findall(r"unreader\.(\w+)\(", inspect.getsource(message)))

    assert asked == {"read", "unread"}
    assert list(inspect.signature(Unreader.read).parameters) == ["self", "size", "read_ahead"]


def test_the_rules_have_all_that_the_parser_asks_of_the_configuration(cfg: config.Config) -> None:
    source = inspect.getsource(message)
    asked = set(re.findall(r"cfg\.(\w+)", source)) | set(re.findall(r"cfg, '(\w+)'", source))

    assert {name: getattr(cfg, name) for name in asked} == {
        name: getattr(HeadRules(cfg), name) for name in asked
    }


@pytest.mark.parametrize("allowed", ["", "127.0.0.1", "192.0.2.0/24", "*"])
@pytest.mark.parametrize("peer", [PEER, ("::1", 4321, 0, 0), "unix"])
def test_the_peers_that_are_trusted_are_gunicorns_but_nobody_where_none_is_named(
    cfg: config.Config, peer: object, allowed: str
) -> None:
    cfg.set("forwarded_allow_ips", allowed)
    ours = ImageRequest(HeadRules(cfg), _HeadReader(GET), peer, 1)

    theirs = Request(cfg, _HeadReader(GET), peer, 1)._peer_is_trusted_proxy()
    assert ours._peer_is_trusted_proxy() == (bool(allowed) and theirs)


# Errors


def test_every_parse_error_has_a_row_and_every_row_a_reason() -> None:
    missing = {status for _, status, _ in _HEAD_ERRORS} - REASONS.keys()
    rows = [cls for cls, _, _ in _HEAD_ERRORS]

    assert (missing, rows[-1]) == (set(), Exception)
    for above, below in itertools.pairwise(rows):
        assert not issubclass(below, above), "a row that is never reached"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize(
    ("head", "status", "message"),
    [
        pytest.param(b"GET /%b HTTP/1.1" % (b"x" * 8190), 414, "request line too long", id="line"),
        pytest.param(
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101, 431, "request head too large", id="fields"
        ),
        pytest.param(
            b"GET / HTTP/1.1\r\na: " + b"b" * 9000, 431, "request head too large", id="field"
        ),
        pytest.param(b"GET /", 400, "invalid request line", id="no-version"),
        pytest.param(b"get / HTTP/1.1", 400, "invalid method", id="lower-case"),
        pytest.param(b"GET / HTTP/3.0", 400, "unsupported HTTP version", id="version"),
        pytest.param(b"GET / HTTP/1.1\r\na b: c", 400, "invalid request head", id="name"),
        pytest.param(b"GET / HTTP/1.1\r\na: b\r\n c", 400, "invalid request head", id="folded"),
        pytest.param(
            b"PUT / HTTP/1.1\r\nContent-Length: +1", 400, "Invalid Content-Length", id="length"
        ),
        pytest.param(
            b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2",
            400,
            "Invalid Content-Length",
            id="two-lengths",
        ),
        pytest.param(
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: what",
            501,
            "unsupported transfer coding",
            id="coding",
        ),
        pytest.param(
            b"PUT / HTTP/1.1\r\nExpect: what",
            417,
            "unsupported expectation; only 100-continue is supported",
            id="expectation",
        ),
    ],
)
def test_a_head_that_cannot_be_parsed_is_answered_in_json(
    cfg: config.Config,
    pair: tuple[socket.socket, socket.socket],
    head: bytes,
    status: int,
    message: str,
) -> None:
    cfg.set("limit_request_line", 8190)
    conn = Connection(pair[0], PEER, ("127.0.0.1", 80))
    conn.buffer += head + b"\r\n\r\n"

    assert not serve(conn, Wire(pair[0], 5.0), lambda *_: [], Gateway(cfg), lambda: False)
    answer = pair[1].recv(1 << 16)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"error": message}


@pytest.mark.parametrize("peer", [("127.0.0.1", 4321), "unix"])
@pytest.mark.parametrize("name", ["/elsewhere", "/images"])
def test_no_header_changes_the_path(
    configured: config.Config, pair: tuple[socket.socket, socket.socket], peer: object, name: str
) -> None:
    paths = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        paths.append(environ["PATH_INFO"])
        start_response("200 OK", [("Content-Length", "0")])
        return []

    conn = Connection(pair[0], peer, ("127.0.0.1", 80))
    conn.buffer += f"GET /images/t HTTP/1.1\r\nHost: h\r\nSCRIPT_NAME: {name}\r\n\r\n".encode()
    serve(conn, Wire(pair[0], 5.0), app, Gateway(configured), lambda: False)

    assert paths == ["/images/t"]
