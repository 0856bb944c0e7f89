# SPDX-License-Identifier: Apache-2.0
"""Common heads: what is read of them is what gunicorn's parser, and ours on top of it, read."""

from typing import Any

import pytest
from gunicorn.config import Config

from imageserver.server.commonhead import CommonHead
from imageserver.server.environ import _add_fields
from imageserver.server.request import HeadRules, ImageRequest, _HeadReader, parse_head

PEER = ("192.0.2.1", 4321)
OPTIONS = b"OPTIONS /images/* HTTP/1.1\r\nHost: h:1\r\nConnection: keep-alive\r\n\r\n"
GET = (
    b"GET /images/a%20b?flush=y HTTP/1.1\r\nHost: [::1]:54322\r\nRange: bytes=0-65535\r\n"
    b"Accept-Encoding: identity\r\nUser-Agent: x/1 (y; z)\r\nAccept: */*\r\n"
    b"Authorization: Bearer a.b-c\r\nX-Request-Id:\t1 \r\nIf-Range:\r\n\r\n"
)
PUT = (
    b"PUT /images/a HTTP/1.1\r\nHOST: h\r\ncontent-length: 65536\r\nConnection: close\r\n"
    b"Content-Range: bytes 0-65535/*\r\nContent-Type: application/octet-stream\r\n\r\n"
)
COMMON = [OPTIONS, GET, PUT]
#: What a byte of a head is replaced by: all that means something in one, and what may not be there.
BYTES = b'\0\t\n\r !"#%*+,-./019:;=?@AHT[\\]_az{|}~\x7f\x80\xff'
INSERTED = [
    *(b"Expect: 100-continue", b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"),
    *(b"Host: g", b"Content-Length: 1", b"Content-Length: 65536", b"X-Forwarded-Proto: https"),
    *(b"A_b: c", b"Range: bytes=1-", b"Connection: upgrade", b"connection: close, x", b": a"),
    *(b" folded", b"\tfolded", b"a b: c", b"a : c", b"a", b"", b"Content-Length: \xb2", b"a: \x0b"),
]


@pytest.fixture(scope="module")
def rules() -> HeadRules:
    return HeadRules(_configured())


def _configured(**changed: object) -> Config:
    cfg = Config()
    cfg.set("http_parser", "python")
    for name, value in {"limit_request_line": 8190, **changed}.items():
        cfg.set(name, value)
    return cfg


def _told(req: CommonHead | ImageRequest) -> dict[str, Any]:
    told = {
        name: getattr(req, name)
        for name in ("method", "uri", "path", "query", "version", "scheme", "length")
    }
    fields: dict[str, str] = {}
    _add_fields(fields, req.headers)
    told["fields"] = fields if req.fields is None else req.fields
    return told | {"expects": req.expects_continue, "closes": req.should_close()}


def _changed(head: bytes) -> set[bytes]:
    """Return a head with each byte replaced, left out, and each line doubled; with lines more."""
    lines = head.split(b"\r\n")
    places = range(len(head))
    return {
        *(head[:at] + bytes([byte]) + head[at + 1 :] for at in places for byte in BYTES),
        *(head[:at] + head[at + 1 :] for at in places),
        *(b"\r\n".join([*lines[:at], *lines[at - 1 :]]) for at in range(1, len(lines))),
        *(b"\r\n".join([*lines[:-2], line, b"", b""]) for line in INSERTED),
        *(b"\r\n".join([lines[0], line, *lines[1:]]) for line in INSERTED),
    }


@pytest.mark.parametrize("head", COMMON)
def test_what_clients_send_is_taken(rules: HeadRules, head: bytes) -> None:
    assert isinstance(parse_head(rules, head, PEER, 1), CommonHead)


@pytest.mark.parametrize("head", COMMON)
@pytest.mark.parametrize("peer", [PEER, "unix"])
def test_whatever_is_taken_is_read_as_gunicorn_reads_it(
    rules: HeadRules, head: bytes, peer: object
) -> None:
    heads = {head, *_changed(head)}
    # Twice: the first time reads each line, the second knows most of them.
    taken = {each: req for each in heads if (req := rules.common.read(each))}
    again = {each: req for each in heads if (req := rules.common.read(each))}

    assert len(taken) > len(heads) // 10
    assert taken.keys() == again.keys()
    for each, req in taken.items():
        told = _told(ImageRequest(rules, _HeadReader(each), peer, 1))
        assert _told(req) == told, each
        assert _told(again[each]) == told, each


@pytest.mark.parametrize(
    "changed",
    [
        {"limit_request_line": 4000},
        {"limit_request_field_size": 4000},
        {"limit_request_fields": 99},
        {"proxy_protocol": "v1"},
    ],
)
def test_where_gunicorn_is_told_otherwise_it_reads_every_head(changed: dict[str, object]) -> None:
    assert HeadRules(_configured(**changed)).common.read(GET) is None


def test_no_token_is_kept_in_memory(rules: HeadRules) -> None:
    rules.common.read(GET)

    known = [*rules.common._fields, *rules.common._starts]
    assert "User-Agent: x/1 (y; z)" in known
    assert not any("Bearer" in line for line in known)


def test_no_more_lines_are_kept_than_a_worker_has_room_for(rules: HeadRules) -> None:
    for number in range(2000):
        head = b"GET /images/%d HTTP/1.1\r\nHost: h%d\r\nAccept: %d\r\n\r\n"
        assert rules.common.read(head % (number, number, number))

    assert 0 < len(rules.common._starts) <= 512
    assert 0 < len(rules.common._fields) <= 512


def test_a_long_head_is_gunicorns(rules: HeadRules) -> None:
    assert rules.common.read(GET[:-2] + b"A: " + b"b" * 4096 + b"\r\n\r\n") is None
