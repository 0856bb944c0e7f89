# SPDX-License-Identifier: Apache-2.0
"""Heads where RFC 9110 and 9112 ask more than gunicorn does: Host, Connection, versions."""

import pytest
from falcon import App
from gunicorn.config import Config
from gunicorn.http.errors import InvalidHeader, InvalidRequestMethod

from imageserver.server.request import BadHost, HeadRules, ImageRequest, _HeadReader


def _parse(*lines: str, version: str = "1.1", method: str = "GET") -> ImageRequest:
    cfg = Config()
    cfg.set("http_parser", "python")
    head = "".join(f"{line}\r\n" for line in (f"{method} / HTTP/{version}", *lines, ""))
    return ImageRequest(HeadRules(cfg), _HeadReader(head.encode("latin-1")), ("192.0.2.1", 4321), 1)


@pytest.mark.parametrize(
    "host",
    [
        *("x", "images.example:54323", "192.0.2.1", "a_b", "x:", "[::1]", "[2001:db8::1]:80"),
        *("[fe80::1%25eth0]", "[fe80::1%eth0]:1", "a%20b", "", ":80", "\tx "),
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_a_host_that_the_grammar_allows_is_taken(host: str, version: str) -> None:
    assert _parse(f"Host: {host}", version=version).headers == [("HOST", host.strip())]


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "http://a", "a@b", "[::1", "::1", "a:b", "a:1:2", "a?", "h\xe9", '"a"']
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_host_that_the_grammar_forbids_is_refused(host: str, version: str) -> None:
    with pytest.raises(BadHost, match="invalid Host header"):
        _parse(f"Host: {host}", version=version)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("second", ["x", "y", ""])
def test_two_hosts_are_refused(version: str, second: str) -> None:
    with pytest.raises(InvalidHeader, match="HOST"):
        _parse("Host: x", f"host: {second}", version=version)


@pytest.mark.parametrize("version", ["1.1", "1.2", "1.9"])
def test_http_1_1_needs_a_host(version: str) -> None:
    with pytest.raises(BadHost, match="Host header required"):
        _parse(version=version)


def test_http_1_0_needs_none() -> None:
    assert _parse(version="1.0").headers == []


@pytest.mark.parametrize("peer", [("192.0.2.1", 4321), ("::1", 4321, 0, 0), "unix"], ids=str)
def test_no_peer_is_taken_for_a_proxy_whatever_it_forwards(
    configured: Config, peer: object
) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n"
    req = ImageRequest(HeadRules(configured), _HeadReader(head), peer, 1)

    assert (req.scheme, req.remote_addr) == ("http", peer)


@pytest.mark.parametrize("method", sorted(App._META_METHODS))
def test_a_method_that_falcon_would_raise_at_is_refused(method: str) -> None:
    with pytest.raises(InvalidRequestMethod):
        _parse("Host: x", method=method)


@pytest.mark.parametrize(("asked", "spoken"), [("1.0", (1, 0)), ("1.1", (1, 1)), ("1.2", (1, 1))])
def test_a_later_minor_version_is_spoken_to_as_1_1(asked: str, spoken: tuple[int, int]) -> None:
    assert _parse("Host: x", version=asked).version == spoken


@pytest.mark.parametrize(
    ("version", "lines", "closes"),
    [
        ("1.1", [], False),
        ("1.1", ["keep-alive"], False),
        ("1.1", ["TE"], False),
        ("1.1", ["close-notify"], False),
        ("1.1", ["close"], True),
        ("1.1", ["Close"], True),
        ("1.1", ["close, TE"], True),
        ("1.1", ["TE, close"], True),
        ("1.1", ["TE,\tCLOSE ,"], True),
        ("1.1", ["keep-alive, close"], True),
        ("1.1", ["TE", "close"], True),
        ("1.1", ["keep-alive", "close"], True),
        ("1.2", [], False),
        ("1.0", [], True),
        ("1.0", ["keep-alive"], False),
        ("1.0", ["TE, Keep-Alive"], False),
        ("1.0", ["TE", "keep-alive"], False),
        ("1.0", ["keep-alive, close"], True),
    ],
)
def test_connection_is_a_list_over_all_its_lines(
    version: str, lines: list[str], closes: bool
) -> None:
    fields = [f"Connection: {line}" for line in lines]

    assert _parse("Host: x", *fields, version=version).should_close() is closes
