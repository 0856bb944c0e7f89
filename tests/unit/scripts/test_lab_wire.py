# SPDX-License-Identifier: Apache-2.0
"""The HTTP client of the benchmark, the load test and the soak takes what came, and no more."""

import socket
from collections.abc import Callable, Iterator

import pytest
from lab.wire import Cut, Hanging, Wire

HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def connect() -> Iterator[Callable[..., Wire]]:
    """What connects to a server that says these bytes; one that ``ends`` closes then."""
    held = []

    def to(said: bytes, *, ends: bool = True, buffer: int = 64) -> Wire:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            wire = Wire(listener.getsockname()[1], 0.2, buffer=buffer)
            peer, _ = listener.accept()
        peer.sendall(said)
        if ends:
            peer.shutdown(socket.SHUT_WR)
        held.extend((wire, peer))
        return wire

    yield to
    for each in held:
        each.__exit__(None, None, None)


@pytest.mark.parametrize("buffer", [33, 64, 4096])
@pytest.mark.parametrize(
    ("said", "body"),
    [
        (b"Content-Length: 100\r\n\r\n" + b"x" * 100, b"x" * 100),
        (b"content-length:0\r\n\r\n", b""),
        (
            b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n50\r\n%s\r\n0\r\n\r\n" % (b"y" * 80),
            b"abc" + b"y" * 80,
        ),
    ],
    ids=["length", "empty", "chunked"],
)
def test_an_answer_is_followed_by_the_next(connect, said: bytes, body: bytes, buffer: int):
    wire = connect((HEAD + said) * 3, buffer=buffer + len(HEAD))
    assert [wire.answer().body for _ in range(3)] == [body] * 3


def test_without_a_length_the_body_is_all_that_comes(connect):
    assert connect(HEAD + b"\r\n" + b"z" * 200).answer().body == b"z" * 200


def test_a_head_has_a_status_and_fields(connect):
    wire = connect(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After:  1 \r\n\r\n")
    assert wire.body(wire.head()) == b""
    head = wire.head()
    assert (head.status, head.fields) == (503, {"retry-after": "1"})


def test_the_answer_to_a_head_request_has_no_body(connect):
    wire = connect(HEAD + b"Content-Length: 5\r\n\r\n" + HEAD + b"Content-Length: 0\r\n\r\n")
    assert wire.answer("HEAD").fields == {"content-length": "5"}
    assert wire.answer().status == 200


@pytest.mark.parametrize(
    ("said", "came"),
    [
        (b"", b""),
        (HEAD, b""),
        (HEAD + b"Content-Length: 9\r\n\r\nabc", b"abc"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\nabc", b"abc"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"abc"),
    ],
    ids=["nothing", "head", "length", "chunk", "last chunk"],
)
def test_a_cut_answer_is_no_answer_and_what_came_is_told(connect, said: bytes, came: bytes):
    with pytest.raises(Cut) as caught:
        connect(said).answer()
    assert caught.value.body == came


def test_what_is_no_http_is_no_answer(connect):
    with pytest.raises(Cut, match="no answer"):
        connect(b"HTTP/1.0 200 OK\r\n\r\n").answer()


def test_silence_is_told_from_an_end(connect):
    with pytest.raises(Hanging):
        connect(HEAD, ends=False).answer()


def test_nobody_there_is_a_cut_that_names_the_cause():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Cut, match=r"^ConnectionRefusedError: "):
        Wire(port, 1)
