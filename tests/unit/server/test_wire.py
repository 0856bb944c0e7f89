# SPDX-License-Identifier: Apache-2.0
"""Bytes over real socket pairs: whole however they part, bounded in silence, bodies kept apart."""

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from imageserver.core.errors import ClientGone
from imageserver.server import wire as module
from imageserver.server.wire import REASONS, RequestInput, Wire, refusal

BIG = bytes(range(256)) * 16384  # 4 MiB: more than any socket's buffer


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Return (the server's end, the client's end)."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0)
    theirs.settimeout(5)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def wire(pair: tuple[socket.socket, socket.socket]) -> Wire:
    return Wire(pair[0], 5.0)


@pytest.fixture
def client(pair: tuple[socket.socket, socket.socket]) -> socket.socket:
    return pair[1]


def _receive(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := client.recv(size - len(data))):
        data += piece
    return data


def _arrived(client: socket.socket) -> bytes:
    """Return what has been sent so far."""
    client.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        return client.recv(1 << 20)
    return b""


# Sending


def test_pieces_arrive_in_order_and_empty_ones_do_not_matter(
    wire: Wire, client: socket.socket
) -> None:
    wire.send(b"", b"head", memoryview(b"body"), b"", b"end")
    wire.send()
    wire.send(b"")

    assert _arrived(client) == b"headbodyend"


def test_what_is_larger_than_the_sockets_buffer_arrives_whole(
    wire: Wire, client: socket.socket
) -> None:
    with ThreadPoolExecutor(1) as thread:
        received = thread.submit(_receive, client, len(BIG) * 2 + 8)
        wire.send(b"head", BIG, memoryview(bytearray(BIG)), b"tail")

        assert received.result(10) == b"head" + BIG + BIG + b"tail"


def test_a_client_that_takes_nothing_is_given_up(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    with pytest.raises(ClientGone):
        Wire(pair[0], 0.05).send(BIG)


def test_a_client_that_takes_some_now_and_then_is_not_given_up(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    real, taken = module.wait, bytearray()

    def take_some(sock: socket.socket, events: int, limit: float, *_: object) -> bool:
        nonlocal seconds
        seconds += limit
        taken.extend(pair[1].recv(8192))
        return real(sock, events, 0)

    monkeypatch.setattr(module, "wait", take_some)
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds)
    Wire(pair[0], 1.0).send(BIG)

    assert seconds > 5
    assert bytes(taken) + _receive(pair[1], len(BIG) - len(taken)) == BIG


def test_a_client_that_has_closed_is_gone(wire: Wire, client: socket.socket) -> None:
    client.close()

    with pytest.raises(ClientGone) as raised:
        wire.send(b"anybody?")
    assert isinstance(raised.value.__cause__, BrokenPipeError)


def test_a_client_that_closes_while_we_wait_is_gone_at_once(
    wire: Wire, client: socket.socket
) -> None:
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(wire.send, BIG)
        client.recv(1)
        client.close()

        with pytest.raises(ClientGone):
            sending.result(4)  # less than the wire's timeout


# Receiving


def test_what_has_arrived_is_received(wire: Wire, client: socket.socket) -> None:
    client.sendall(b"abc")
    buffer = bytearray(8)

    assert (wire.recv_into(memoryview(buffer)), buffer) == (3, b"abc\0\0\0\0\0")


def test_receiving_waits_for_the_first_byte(wire: Wire, client: socket.socket) -> None:
    with ThreadPoolExecutor(1) as thread:
        count = thread.submit(wire.recv_into, memoryview(bytearray(8)))
        client.sendall(b"a")

        assert count.result(4) == 1


@pytest.mark.parametrize("sent", [b"", b"abc"])
def test_receiving_ends_when_something_else_happens_first(
    wire: Wire, client: socket.socket, sent: bytes
) -> None:
    client.sendall(sent)
    bell, ringer = socket.socketpair()
    with bell, ringer:
        ringer.sendall(b"!")

        assert wire.recv_into(memoryview(bytearray(8)), bell) == len(sent)


def test_a_closed_connection_reads_as_the_end(wire: Wire, client: socket.socket) -> None:
    client.close()

    assert wire.recv_into(memoryview(bytearray(8))) == 0


def test_a_silent_client_is_given_up(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(ClientGone):
        Wire(pair[0], 0.05).recv_into(memoryview(bytearray(8)))


def test_a_reset_connection_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    with ours:
        ours.settimeout(0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()

        with pytest.raises(ClientGone):
            Wire(ours, 5.0).recv_into(memoryview(bytearray(8)))


# A request's body


def _body(
    wire: Wire, early: bytes, length: int, *, expects: bool = False
) -> tuple[RequestInput, bytearray]:
    buffer = bytearray(early)
    return RequestInput(wire, buffer, length, expects_continue=expects), buffer


def test_what_came_with_the_head_is_read_first_then_the_socket(
    wire: Wire, client: socket.socket
) -> None:
    client.sendall(b"defgh")
    body, early = _body(wire, b"abc", 8)

    assert (body.read(2), body.read(2), body.read(), body.left) == (b"ab", b"cd", b"efgh", 0)
    assert early == b""


def test_pipelined_bytes_stay_for_the_next_request(wire: Wire, client: socket.socket) -> None:
    client.sendall(b"not read")
    body, early = _body(wire, b"abcGET / HTTP/1.1", 3)

    assert (body.read(), body.read(), body.readinto(memoryview(bytearray(9)))) == (b"abc", b"", 0)
    assert (early, wire.sock.recv(100)) == (b"GET / HTTP/1.1", b"not read")


def test_bytes_of_the_next_request_stay_in_the_socket(wire: Wire, client: socket.socket) -> None:
    client.sendall(b"abcGET /")
    body, _ = _body(wire, b"", 3)

    assert body.readinto(memoryview(bytearray(100))) == 3
    assert wire.sock.recv(100) == b"GET /"


def test_a_body_that_ends_early_reads_as_far_as_it_goes(wire: Wire, client: socket.socket) -> None:
    client.sendall(b"ab")
    client.close()
    body, _ = _body(wire, b"", 5)

    assert (body.read(), body.read(), body.left) == (b"ab", b"", 3)


def test_a_small_body_byte_by_byte_has_the_client_timeout_in_all(
    wire: Wire, client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    body, _ = _body(wire, b"", 100)
    receive = wire.recv_into

    def take_a_second(buffer: memoryview, *until: object) -> int:
        nonlocal seconds
        seconds += 1
        client.sendall(b"a")
        return receive(buffer)

    monkeypatch.setattr(wire, "recv_into", take_a_second)
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds)
    with pytest.raises(ClientGone):
        body.read(100)
    assert seconds == 6


def test_continue_is_sent_at_the_first_read_and_only_then(
    wire: Wire, client: socket.socket
) -> None:
    body, _ = _body(wire, b"", 4, expects=True)
    sent = [_arrived(client)]
    client.sendall(b"ab")
    body.readinto(memoryview(bytearray(4)))
    sent.append(_arrived(client))
    client.sendall(b"cd")
    body.readinto(memoryview(bytearray(4)))
    sent.append(_arrived(client))

    assert sent == [b"", b"HTTP/1.1 100 Continue\r\n\r\n", b""]


@pytest.mark.parametrize(
    ("length", "read"),
    [pytest.param(0, 8, id="empty-body"), pytest.param(5, 0, id="nothing-asked-for")],
)
def test_nothing_to_read_asks_for_no_body(
    wire: Wire, client: socket.socket, length: int, read: int
) -> None:
    body, _ = _body(wire, b"", length, expects=True)

    assert (body.read(read), _arrived(client)) == (b"", b"")


def test_a_client_that_did_not_expect_is_not_told_to_continue(
    wire: Wire, client: socket.socket
) -> None:
    client.sendall(b"ab")
    body, _ = _body(wire, b"", 2)

    assert (body.read(), _arrived(client)) == (b"ab", b"")


def test_what_came_early_of_an_unread_body_is_dropped_and_no_more(wire: Wire) -> None:
    body, early = _body(wire, b"abcGET /", 3)
    body.discard_early()

    assert (body.left, early) == (0, b"GET /")


def test_an_unread_body_that_has_not_all_come_has_bytes_left(wire: Wire) -> None:
    body, early = _body(wire, b"abc", 10)
    body.read(1)
    body.discard_early()

    assert (body.left, early) == (7, b"")


# Refusals


@pytest.mark.parametrize("status", REASONS)
@pytest.mark.parametrize("retry", [False, True])
def test_a_refusal_is_a_whole_answer_with_the_usual_headers(status: int, retry: bool) -> None:
    answer = refusal(status, 'no "thanks"', b"GET / HTTP/1.1\r\n", retry=retry)
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)

    assert first == f"HTTP/1.1 {status} {REASONS[status]}"
    assert headers == {
        "Connection": "close",
        "Accept-Ranges": "bytes",
        "Access-Control-Allow-Methods": "GET, PUT, OPTIONS",
        "Cache-Control": "no-store",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    } | ({"Retry-After": "1"} if retry else {})
    assert json.loads(body) == {"error": 'no "thanks"'}
    asked = bytearray(b"HEAD / HTTP/1.1\r\n")
    assert refusal(status, 'no "thanks"', asked, retry=retry) == head + b"\r\n\r\n"
