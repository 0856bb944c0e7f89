# SPDX-License-Identifier: Apache-2.0
"""How connections end, how answers break, and clients that take nothing, over a socket pair."""

import contextlib
import json
import select
import socket
from collections.abc import Iterable, Iterator

import pytest

from imageserver.core.errors import ClientGone
from imageserver.server.exchange import cut
from imageserver.web.requests import FORCE_CLOSE, IS_GONE
from tests.unit.exchanges import App, Line, put

# Clients that take nothing


def _fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(4096))


@pytest.mark.parametrize("pieces", [(b"abc",), [b"a", b"bc"]], ids=["one piece", "two pieces"])
def test_an_answer_that_is_complete_never_waits_for_its_client(
    line: Line, pieces: Iterable[bytes]
) -> None:
    _fill(line.conn.sock)

    assert line.ask(App(pieces=pieces))
    head, _, body = line.conn.unsent.partition(b"\r\n\r\n")
    assert (head[:15], body) == (b"HTTP/1.1 200 OK", b"abc")


def test_what_the_client_takes_of_an_answer_is_sent_at_once(line: Line) -> None:
    body = bytes(range(256)) * 16384
    app = App(headers=[("Content-Length", str(len(body)))], pieces=[body])

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
        pytest.param("garbage\r\n\r\n", App(), id="bad-head"),
        pytest.param("GET /x HTTP/1.1\r\nHost: x\r\n\r\n", App(look=lambda _: 1 // 0), id="bug"),
    ],
)
def test_a_refusal_never_waits_for_its_client(line: Line, head: str, app: App) -> None:
    _fill(line.conn.sock)

    assert not line.ask(app, head)
    assert line.conn.unsent.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 500 "))


@pytest.mark.parametrize(
    ("head", "app"),
    [
        pytest.param("HEAD /x HTTP/1.1\r\nHost: a b\r\n\r\n", App(), id="bad-head"),
        pytest.param("HEAD /x HTTP/1.1\r\nHost: x\r\n\r\n", App(look=lambda _: 1 // 0), id="bug"),
    ],
)
def test_a_refusal_of_head_has_headers_only(line: Line, head: str, app: App) -> None:
    assert not line.ask(app, head)

    first, headers, body = line.answer()
    assert first.startswith(("HTTP/1.1 400 ", "HTTP/1.1 500 "))
    assert (int(headers["Content-Length"]) > 0, body) == (True, b"")


def test_a_complete_answer_of_the_wrong_length_is_an_error_of_ours(line: Line) -> None:
    assert not line.ask(App(pieces=[b"ab"]))

    assert line.answer()[0] == "HTTP/1.1 500 Internal Server Error"


# How connections end


def test_a_connection_is_kept_if_its_unread_body_is_there_whole(line: Line) -> None:
    assert line.ask(App(), put(2) + "abGET /y")

    assert line.answer()[1]["Connection"] == "keep-alive"
    assert line.conn.buffer == b"GET /y"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(put(3) + "ab", id="unread-body"),
        pytest.param(
            "PUT /x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            id="chunked",
        ),
        pytest.param("GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", id="close"),
        pytest.param("GET /x HTTP/1.0\r\n\r\n", id="http-1.0"),
    ],
)
def test_a_connection_that_cannot_go_on_says_so(line: Line, head: str) -> None:
    assert not line.ask(App(), head)

    assert line.answer()[1]["Connection"] == "close"


def test_the_last_answer_of_a_worker_ends_the_connection(line: Line) -> None:
    assert not line.ask(App(), last=True)

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


def test_the_answers_pieces_are_closed(line: Line) -> None:
    pieces = _Closing(b"abc")
    line.ask(App(pieces=pieces))

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
    line: Line, pieces: _Closing
) -> None:
    with pytest.raises(ClientGone):
        line.ask(App(pieces=pieces))
    assert pieces.closed == 1


def test_a_chunked_answer_that_breaks_lacks_its_end(line: Line) -> None:
    with pytest.raises(ClientGone):
        line.ask(App(headers=[], pieces=_Closing(b"abc", then=RuntimeError("bug"))))

    assert line.answer()[2] == b"3\r\nabc\r\n"


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(App(look=lambda _: 1 // 0), id="before-the-answer"),
        pytest.param(App(pieces=_Closing(then=RuntimeError("/secret"))), id="before-a-byte"),
        pytest.param(App(headers=[("X", "a\r\nb")]), id="header-with-line-break"),
    ],
)
def test_an_application_that_fails_before_the_first_byte_is_answered_for(
    line: Line, app: App
) -> None:
    assert not line.ask(app)

    first, headers, body = line.answer()
    assert (first, headers["Connection"]) == ("HTTP/1.1 500 Internal Server Error", "close")
    assert json.loads(body) == {"error": "internal error"}


def test_a_client_that_vanishes_before_the_answer_gets_none(line: Line) -> None:
    def vanish(_: object) -> None:
        raise ClientGone

    with pytest.raises(ClientGone):
        line.ask(App(look=vanish))
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


def test_the_application_may_look_for_the_client_until_its_answer_begins(line: Line) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"a"
        assert not app.environ[IS_GONE]()
        yield b"bc"

    app = App(look=lambda environ: environ[IS_GONE](), pieces=pieces())
    line.client.shutdown(socket.SHUT_WR)
    line.ask(app)

    assert app.seen is False
    asked, _, answer = line.client.recv(1 << 20).partition(b"\r\n\r\n")
    assert asked == b"HTTP/1.1 100 Continue"
    assert (answer.count(b"HTTP/1.1"), answer[-3:]) == (1, b"abc")


def test_the_application_hears_that_the_client_has_gone(line: Line) -> None:
    app = App(look=lambda environ: environ[IS_GONE]())
    line.client.close()

    with contextlib.suppress(ClientGone):
        line.ask(app)
    assert app.seen is True


def test_an_application_may_end_the_connection(line: Line) -> None:
    assert not line.ask(App(look=lambda environ: environ[FORCE_CLOSE]()))

    _, headers, body = line.answer()
    assert (headers["Connection"], body) == ("close", b"abc")
