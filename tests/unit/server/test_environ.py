# SPDX-License-Identifier: Apache-2.0
"""The WSGI environment, compared with what gunicorn makes of the same request."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http.errors import ConfigurationProblem
from gunicorn.http.wsgi import create

from imageserver.server.connection import Connection
from imageserver.server.environ import Gateway
from imageserver.server.request import ImageRequest, _HeadReader

#: What ours has not, what the exchange sets, and what is made anew for each request.
NOT_COMPARED = {"wsgi.early_hints", "wsgi.input", "wsgi.multithread", "wsgi.errors"}
PEER, LISTENER = ("192.0.2.1", 4321), ("127.0.0.1", 80)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


@pytest.fixture
def cfg() -> Config:
    cfg = Config()
    cfg.set("http_parser", "python")
    return cfg


def _both(
    cfg: Config, sock: socket.socket, head: bytes, peer: object, listener: object
) -> tuple[dict[str, Any], dict[str, Any]]:
    gateway, conn = Gateway(cfg), Connection(sock, peer, listener)
    req = ImageRequest(gateway.rules, _HeadReader(head), peer, 1)
    ours = gateway.environ(req, conn)
    req._expected_100_continue = False
    _, theirs = create(req, sock, peer, listener, cfg)
    return tuple(  # type: ignore[return-value]
        {key: value for key, value in environ.items() if key not in NOT_COMPARED}
        for environ in (ours, theirs)
    )


@pytest.mark.parametrize(
    "head",
    [
        b"GET /images/a%2Fb%20c?q=1&r HTTP/1.1\r\nHost: h:81\r\n\r\n",
        b"GET http://h/images/x HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET //x#y HTTP/1.0\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: h\r\nAccept: a\r\naccept: b\r\nAccept: c\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nX-Forwarded-Proto: https\r\n\r\n",
        b"PUT / HTTP/1.1\r\nHost: h\r\nContent-Type: a/b\r\nExpect: 100-continue\r\n\r\n",
    ],
)
@pytest.mark.parametrize("listener", [LISTENER, ("::1", 80, 0, 0), "/run/s"])
@pytest.mark.parametrize("peer", [PEER, ("::1", 4321, 0, 0), "unix"])
def test_the_environ_is_gunicorns(
    cfg: Config, sock: socket.socket, head: bytes, peer: object, listener: object
) -> None:
    ours, theirs = _both(cfg, sock, head, peer, listener)

    assert ours == theirs


def test_a_prefix_from_the_environment_is_taken_off_the_path(
    cfg: Config, sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRIPT_NAME", "/here")
    ours, theirs = _both(cfg, sock, b"GET /here/x HTTP/1.1\r\nHost: h\r\n\r\n", PEER, LISTENER)

    assert (ours, ours["PATH_INFO"]) == (theirs, "/x")
    with pytest.raises(ConfigurationProblem):
        _both(cfg, sock, b"GET /there HTTP/1.1\r\nHost: h\r\n\r\n", PEER, LISTENER)


def test_an_abstract_listener_is_named_like_any_other(cfg: Config, sock: socket.socket) -> None:
    head = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    ours, theirs = _both(cfg, sock, head, "unix", "/run/s")
    gateway, conn = Gateway(cfg), Connection(sock, "unix", b"\0name")

    environ = gateway.environ(ImageRequest(gateway.rules, _HeadReader(head), "unix", 1), conn)

    assert (environ["SERVER_NAME"], environ["SERVER_PORT"]) == ("h", "80")
    assert (ours["SERVER_NAME"], ours["SERVER_PORT"]) == (theirs["SERVER_NAME"], "80")


def test_one_requests_environ_is_not_the_nexts(cfg: Config, sock: socket.socket) -> None:
    gateway, conn = Gateway(cfg), Connection(sock, PEER, LISTENER)
    req = ImageRequest(gateway.rules, _HeadReader(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"), PEER, 1)
    gateway.environ(req, conn)["HTTP_COOKIE"] = "mine"

    assert "HTTP_COOKIE" not in gateway.environ(req, conn)
