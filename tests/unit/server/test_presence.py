# SPDX-License-Identifier: Apache-2.0
"""Whether a client is there: what each way to leave, and to stay, looks like from the server."""

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from imageserver.server.presence import Presence

Ends = tuple[socket.socket, socket.socket]
QUESTION = b"HTTP/1.1 100 Continue\r\n\r\n"


@contextlib.contextmanager
def _tcp() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        with client, listener.accept()[0] as ours:
            yield ours, client


@contextlib.contextmanager
def _unix() -> Iterator[Ends]:
    ours, client = socket.socketpair()
    with ours, client:
        yield ours, client


@pytest.fixture(params=[_tcp, _unix], ids=["tcp", "unix"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    with request.param() as pair:
        pair[0].settimeout(0)
        pair[1].settimeout(5)
        yield pair


def _presence(ours: socket.socket, *, is_tls: bool = False, knows_100: bool = True) -> Presence:
    return Presence(ours, is_tls=is_tls, knows_100=knows_100)


def _is_gone_within(presence: Presence, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not presence.is_gone():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("leave", [_reset, socket.socket.close], ids=["reset", "close"])
def test_a_client_that_leaves_is_gone(ends: Ends, leave: Callable[[socket.socket], None]) -> None:
    ours, client = ends
    presence = _presence(ours)
    assert not presence.is_gone()

    leave(client)

    assert _is_gone_within(presence)


def test_a_client_that_we_cut_off_is_gone(ends: Ends) -> None:
    presence = _presence(ends[0])

    ends[0].shutdown(socket.SHUT_RDWR)

    assert presence.is_gone()


def test_a_client_that_sends_the_next_request_is_there(ends: Ends) -> None:
    presence = _presence(ends[0])

    ends[1].sendall(b"GET / HTTP/1.1\r\n\r\n")

    assert not _is_gone_within(presence, 0.05)


def test_a_client_that_has_half_closed_is_asked_now_and_then_and_is_there(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imageserver.server.presence._ASK_SECONDS", 0.02)
    ours, client = ends
    presence = _presence(ours)

    client.shutdown(socket.SHUT_WR)

    for _ in range(2):
        assert not presence.is_gone()
        assert client.recv(100) == QUESTION
        time.sleep(0.03)
    client.close()
    assert _is_gone_within(presence)


@pytest.mark.parametrize("leave", [_reset, socket.socket.close], ids=["reset", "close"])
def test_a_client_is_gone_whatever_of_its_body_nobody_has_read(
    ends: Ends, leave: Callable[[socket.socket], None]
) -> None:
    ours, client = ends
    presence = _presence(ours)
    client.sendall(bytes(1000))
    assert not presence.is_gone()

    leave(client)

    assert _is_gone_within(presence)


def test_a_client_that_half_closes_behind_its_body_is_there_and_so_is_its_body(ends: Ends) -> None:
    ours, client = ends
    presence = _presence(ours)
    client.sendall(b"body")
    client.shutdown(socket.SHUT_WR)

    assert not _is_gone_within(presence, 0.05)
    assert client.recv(100) == QUESTION
    assert ours.recv(100) == b"body"


def test_a_client_of_http_1_0_is_not_asked_and_counts_as_there(ends: Ends) -> None:
    ours, client = ends
    presence = _presence(ours, knows_100=False)
    client.shutdown(socket.SHUT_WR)

    assert not _is_gone_within(presence, 0.05)
    client.settimeout(0)
    with pytest.raises(BlockingIOError):
        client.recv(1)


def test_nobody_is_asked_once_the_answer_has_begun(ends: Ends) -> None:
    ours, client = ends
    presence = _presence(ours)
    presence.answering()
    client.shutdown(socket.SHUT_WR)

    assert not _is_gone_within(presence, 0.05)
    ours.send(b"HTTP/1.1 200 OK\r\n")
    assert client.recv(100) == b"HTTP/1.1 200 OK\r\n"


def test_nobody_is_asked_behind_what_has_not_been_taken(ends: Ends) -> None:
    ours, client = ends
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += ours.send(bytes(1 << 16))
    presence = _presence(ours)
    client.shutdown(socket.SHUT_WR)

    assert not presence.is_gone()
    while sent:
        data = client.recv(min(sent, 1 << 16))
        assert data.count(0) == len(data)
        sent -= len(data)


def test_over_tls_a_closed_direction_is_the_end() -> None:
    with _tcp() as (ours, client):
        presence = _presence(ours, is_tls=True)
        assert not presence.is_gone()

        client.shutdown(socket.SHUT_WR)

        assert _is_gone_within(presence)


def test_a_dead_host_is_looked_for_over_tcp() -> None:
    with _tcp() as (ours, _):
        _presence(ours).is_gone()

        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
