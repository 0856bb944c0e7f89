# SPDX-License-Identifier: Apache-2.0
"""Connections that wait, over socket pairs and a clock that is set: none waits for ever."""

import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from imageserver.server import loop as module
from imageserver.server.accepting import Acceptors, AcceptPolicy
from imageserver.server.connection import LINGER_SECONDS, Connection
from imageserver.server.loop import Loop, Timeouts
from imageserver.server.states import State
from tests.unit.logged import told
from tests.unit.server.test_tls import context, pki

if TYPE_CHECKING:
    from imageserver.observability.metrics.counted import Metrics

__all__ = ["context", "pki"]

HEAD_SECONDS, IDLE_SECONDS = 8.0, 20.0
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
#: More than a Unix socket's buffers hold.
LARGE = bytes(range(256)) * 4096


class Counted:
    """Metrics that count nothing but what was refused, and TLS that failed."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def refused(self, reason: str) -> None:
        self.reasons.append(reason)

    def tls_failed(self) -> None:
        self.reasons.append("TLS")

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


class _World:
    """A loop, one accepted connection, and its client."""

    def __init__(self, path: Path, tls: ssl.SSLContext | None = None) -> None:
        self.seconds = 1000.0
        self.counted = Counted()
        self.dispatched: list[Connection] = []
        self.loop = Loop(
            Timeouts(HEAD_SECONDS, IDLE_SECONDS),
            self.dispatched.append,
            cast("Metrics", self.counted),
            lambda: self.seconds,
        )
        self.listener = socket.create_server(str(path), family=socket.AF_UNIX)
        self.acceptors = Acceptors(self.loop, lambda _: 0.0, cast("Metrics", self.counted))
        self.acceptors.listen(self.listener, AcceptPolicy(tls, spreads=False))
        self.client = socket.socket(socket.AF_UNIX)
        self.client.settimeout(5)
        self.client.connect(str(path))
        self.loop.step()
        (self.conn,) = self.loop._waiting.values()

    def says(self, data: bytes) -> None:
        self.client.sendall(data)
        self.loop.step()

    def pass_by(self, seconds: float) -> None:
        """Let time pass, a second at a time."""
        for _ in range(round(seconds)):
            self.seconds += 1
            self.loop._expire(self.seconds)

    def answers(self, answer: bytes, *, last: bool = False) -> None:
        """Do as a thread does that has a request and an answer."""
        conn = self.dispatched.pop()
        conn.move(State.QUEUED)
        conn.move(State.WORK)
        conn.requests += 1
        conn.buffer.clear()
        conn.unsent = answer
        with contextlib.suppress(BlockingIOError):
            conn.send()
        (self.loop.linger if last else self.loop.keep)(conn)

    def is_open(self) -> bool:
        return self.conn.state is not State.CLOSED

    def close(self) -> None:
        self.acceptors.close()
        self.loop.close_all()
        self.client.close()
        for conn in self.dispatched:
            conn.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_World]:
    monkeypatch.setattr(module, "TICK", 0.0)  # nothing here comes by itself
    made = _World(tmp_path / "socket")
    yield made
    made.close()


def _take(world: _World, size: int) -> bytes:
    """Take so much of an answer, while the loop sends it."""
    taken = b""
    while len(taken) < size:
        taken += world.client.recv(size - len(taken))
        world.loop.step()
    return taken


# Answers that clients do not take


def test_an_answer_that_fits_leaves_the_connection_idle(world: _World) -> None:
    world.says(REQUEST)
    world.answers(b"answer")

    assert (world.conn.state, world.client.recv(100)) == (State.IDLE, b"answer")


def test_an_answer_that_does_not_fit_is_sent_as_the_client_takes_it(world: _World) -> None:
    world.says(REQUEST)
    world.answers(LARGE)

    assert world.conn.state is State.SENDING
    assert _take(world, len(LARGE)) == LARGE
    assert world.conn.state is State.IDLE


def test_the_next_request_is_looked_at_when_the_answer_has_gone(world: _World) -> None:
    world.says(REQUEST)
    world.answers(LARGE)
    for _ in range(3):
        world.says(REQUEST)

    assert (world.dispatched, bytes(world.conn.buffer)) == ([], b"")
    _take(world, len(LARGE))
    world.loop.step()
    assert world.dispatched == [world.conn]


def test_a_request_that_came_with_the_last_one_is_next_when_the_answer_has_gone(
    world: _World,
) -> None:
    world.says(REQUEST)
    (conn,) = world.dispatched
    world.answers(LARGE)
    conn.buffer += REQUEST
    _take(world, len(LARGE))

    assert (world.dispatched, conn.buffer) == ([conn], REQUEST)


def test_a_last_answer_is_taken_whole_before_the_connection_ends(world: _World) -> None:
    world.says(REQUEST)
    world.answers(LARGE, last=True)

    assert _take(world, len(LARGE)) == LARGE
    assert (world.conn.state, world.client.recv(1)) == (State.LINGER, b"")


def test_a_refusal_waits_for_its_client_too(world: _World) -> None:
    world.says(REQUEST)
    world.loop.refuse(world.dispatched.pop(), LARGE)

    assert world.conn.state is State.SENDING
    assert _take(world, len(LARGE)) == LARGE
    assert world.conn.state is State.LINGER


def test_a_client_that_takes_nothing_for_the_client_timeout_is_cut_off(world: _World) -> None:
    world.says(REQUEST)
    world.answers(LARGE)
    world.pass_by(HEAD_SECONDS - 1)
    assert world.is_open()
    world.pass_by(2)

    assert not world.is_open()


def test_a_client_that_takes_a_little_now_and_then_is_not_cut_off(world: _World) -> None:
    world.says(REQUEST)
    world.answers(LARGE)
    for _ in range(5):
        world.pass_by(HEAD_SECONDS - 2)
        world.client.recv(150_000)  # of Unix sockets, pieces count when they are taken whole
        world.loop.step()

    assert world.is_open()


def test_a_refusal_that_finds_no_client_any_more_is_dropped(world: _World) -> None:
    world.says(REQUEST)
    world.client.close()
    world.loop.refuse(world.dispatched.pop(), LARGE)

    assert (world.conn.state, world.conn.unsent) == (State.LINGER, b"")


def test_a_client_that_vanishes_while_it_is_sent_an_answer_is_forgotten(world: _World) -> None:
    world.says(REQUEST)
    world.answers(LARGE)
    world.client.close()
    for _ in range(3):
        world.loop.step()

    assert (world.is_open(), world.loop.is_empty()) == (False, True)


# Deadlines


@pytest.mark.parametrize("piece", [b"\r\n", b"\n", b""], ids=repr)
@pytest.mark.parametrize("requests", [0, 1])
def test_empty_lines_keep_no_connection_open(world: _World, piece: bytes, requests: int) -> None:
    for _ in range(requests):
        world.says(REQUEST)
        world.answers(b"answer")
    for _ in range(round(IDLE_SECONDS if requests else HEAD_SECONDS)):
        assert world.is_open()
        world.says(piece)
        world.pass_by(1)

    assert not world.is_open()
    assert world.counted.reasons == []


def test_half_an_empty_line_at_a_time_keeps_no_connection_open(world: _World) -> None:
    world.says(REQUEST)
    world.answers(b"answer")
    for number in range(round(IDLE_SECONDS)):
        assert world.is_open()
        world.says(b"\r\n"[number % 2 : number % 2 + 1])
        world.pass_by(1)

    assert not world.is_open()


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_a_head_byte_by_byte_has_the_client_timeout_in_all(world: _World, requests: int) -> None:
    for _ in range(requests):
        world.says(REQUEST)
        world.answers(b"answer")
        world.client.recv(100)
        world.pass_by(5)
    for byte in REQUEST[: round(HEAD_SECONDS)]:
        assert world.conn.state in {State.HEAD, State.IDLE}
        world.says(bytes([byte]))
        world.pass_by(1)

    assert world.conn.state is State.LINGER
    assert world.client.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert world.counted.reasons == ["head_timeout"]


@pytest.mark.parametrize(("begun", "end"), [(b"GET / H", b'"}'), (b"HEAD /", b"\r\n\r\n")])
def test_a_head_that_stops_half_way_is_408(world: _World, begun: bytes, end: bytes) -> None:
    world.says(begun)
    world.pass_by(HEAD_SECONDS - 1)
    assert world.conn.state is State.HEAD
    world.pass_by(1)

    answer = world.client.recv(1000)
    assert (answer[:13], answer[-len(end) :]) == (b"HTTP/1.1 408 ", end)
    assert world.client.recv(1) == b""


def test_a_lingering_client_that_goes_on_sending_is_closed_all_the_same(world: _World) -> None:
    world.says(REQUEST)
    world.answers(b"answer", last=True)
    for _ in range(round(LINGER_SECONDS)):
        assert world.is_open()
        world.says(b"x")
        world.pass_by(1)

    assert not world.is_open()


def test_an_idle_connection_ends_with_its_own_time(world: _World) -> None:
    world.says(REQUEST)
    world.answers(b"answer")
    world.pass_by(IDLE_SECONDS - 1)
    assert world.is_open()
    world.pass_by(1)

    assert not world.is_open()


def test_a_worker_that_ends_closes_what_is_idle_and_no_answer_under_way(world: _World) -> None:
    world.says(REQUEST)
    world.answers(LARGE)
    world.loop.close_idle()
    assert world.is_open()
    _take(world, len(LARGE))
    world.loop.close_idle()

    assert not world.is_open()


# Clients that break TLS


@pytest.mark.parametrize(
    ("shakes_hands", "counted", "details"),
    [
        (False, ["TLS"], {"HTTP_REQUEST"}),
        (True, [], {"WRONG_VERSION_NUMBER", "BAD_RECORD_TYPE", "RECORD_LAYER_FAILURE"}),
    ],
)
def test_who_breaks_tls_is_logged_and_in_the_handshake_counted_too(
    context: ssl.SSLContext,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    shakes_hands: bool,
    counted: list[str],
    details: set[str],
) -> None:
    caplog.set_level(logging.INFO, module.__name__)
    with contextlib.closing(_World(tmp_path / "socket", context)) as world:
        if shakes_hands:
            _shake_hands(world)
        world.says(REQUEST)

        assert (world.conn.state, world.conn.unsent) == (State.LINGER, b"")
    assert world.counted.reasons == counted
    [(event, said)] = map(told, caplog.records)
    assert (event, said["client"], said["detail"] in details) == ("TLS failed", "unix", True)


def _shake_hands(world: _World) -> None:
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = trusting.wrap_bio(came, goes)
    while world.conn.state is State.HANDSHAKE:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        world.says(goes.read())
        if world.conn.state is State.HANDSHAKE:
            came.write(world.client.recv(1 << 16))
