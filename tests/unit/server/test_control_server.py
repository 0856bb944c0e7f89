# SPDX-License-Identifier: Apache-2.0
"""The control socket over real sockets and threads: every peer gets one line, or its end."""

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from imageserver.core.control_protocol import (
    MAX_REQUEST,
    Command,
    List,
    Peer,
    Register,
    Status,
    Unregister,
    succeeded,
)
from imageserver.core.errors import StateFull
from imageserver.server import control as module
from imageserver.server.control import ControlServer
from imageserver.server.credentials import peer_of
from imageserver.server.loop import Loop, Timeouts
from imageserver.server.wire import send_queue
from tests.unit.server.test_loop import Counted

if TYPE_CHECKING:
    from imageserver.observability.metrics.counted import Metrics

STATUS = b'{"action":"status"}\n'
OK = {"status": "ok", "active_transfers": 0}


def _failed(message: str) -> dict[str, str]:
    return {"status": "error", "message": message}


class _World:
    """A control server on a loop; it stands in for ``Administration``, too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = 1000.0
        #: So long that it passes by ``seconds`` only, however busy the machine is.
        self.timeout = 100.0
        self.commands: list[Command] = []
        self.answer = succeeded(0)
        self.error: Exception | None = None
        #: Commands are carried out until this is set, or nobody wants the answer.
        self.done = threading.Event()
        self.done.set()
        self.loop = Loop(Timeouts(5, 5), cast("Any", None), cast("Metrics", Counted()))
        self._ended = False
        self._thread = threading.Thread(target=self._run)

    def run(self, command: Command, is_wanted: Callable[[], bool]) -> bytes:
        self.commands.append(command)
        while not self.done.wait(0.005) and is_wanted():
            pass
        if self.error:
            raise self.error
        return self.answer

    def start(self) -> None:
        self.control = ControlServer(cast("Any", self), self.timeout, lambda: self.seconds)
        listener = socket.create_server(str(self._path), family=socket.AF_UNIX)
        self.control.listen(listener, self.loop)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            self.loop.step()

    def connect(self, data: bytes = b"") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self._path))
        if data:  # the server may have hung up by now
            sock.sendall(data)
        return sock

    def ask(self, data: bytes = STATUS) -> Any:
        with self.connect(data) as sock:
            return _answer(sock)

    def wait_until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self) -> None:
        self.done.set()
        self._ended = True
        self._thread.join()
        self.control.stop()
        self.control.close_silent()
        self.wait_until(self.control.is_empty)


def _answer(sock: socket.socket) -> Any:
    """Return the one line that a peer gets before the end."""
    with sock.makefile("rb") as stream:
        text = stream.read()
    assert (text[-1:], text.count(b"\n")) == (b"\n", 1)
    return json.loads(text)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_World]:
    monkeypatch.setattr("imageserver.server.loop.TICK", 0.005)
    made = _World(tmp_path / "control")
    made.start()
    yield made
    made.close()


# Requests


@pytest.mark.parametrize("ends", [False, True], ids=["newline", "end"])
def test_a_request_ends_with_a_newline_or_with_the_input(world: _World, ends: bool) -> None:
    with world.connect(STATUS.rstrip() if ends else STATUS) as sock:
        if ends:
            sock.shutdown(socket.SHUT_WR)
        assert _answer(sock) == OK
    assert world.commands == [Status()]


def test_a_request_may_arrive_byte_by_byte_and_what_follows_is_ignored(world: _World) -> None:
    with world.connect() as sock:
        for byte in STATUS:
            sock.sendall(bytes([byte]))
        with contextlib.suppress(OSError):
            sock.sendall(b'{"action":"other"}\n')
        assert _answer(sock) == OK
    assert world.commands == [Status()]


@pytest.mark.parametrize("size", [MAX_REQUEST + 1, 32 * MAX_REQUEST], ids=["too-large", "endless"])
def test_a_request_that_is_too_large_is_refused_and_its_sender_reads_why(
    world: _World, size: int
) -> None:
    message = f"request is larger than {MAX_REQUEST} bytes"
    with world.connect(b"x" * size) as sock:
        assert _answer(sock) == _failed(message)
    assert world.commands == []


def test_what_is_no_command_is_told_so_and_does_nothing(world: _World) -> None:
    assert world.ask(b"GET / HTTP/1.1\r\n\r\n")["message"].startswith("invalid JSON: ")
    assert world.commands == []


def test_a_peer_that_dawdles_has_the_timeout_for_the_whole_request(world: _World) -> None:
    with world.connect() as sock:
        for byte in STATUS[:3]:
            world.wait_until(lambda: send_queue(sock) == bytes(4))
            world.seconds += 60
            sock.sendall(bytes([byte]))

        assert _answer(sock) == _failed("request took too long")


def test_peers_that_say_nothing_delay_nobody(world: _World) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(world.connect())
        assert world.ask() == OK


def test_a_peer_that_hangs_up_is_forgotten(world: _World) -> None:
    with world.connect(b'{"action'):
        world.wait_until(lambda: not world.control.is_empty())

    world.wait_until(world.control.is_empty)


# Answers


def test_an_answer_that_no_buffer_holds_is_sent_whole(world: _World) -> None:
    world.answer = b"x" * (4 << 20) + b"\n"
    with world.connect(STATUS) as sock, sock.makefile("rb") as stream:
        assert stream.read() == world.answer


def test_who_does_not_take_the_answer_is_left_and_delays_nobody(world: _World) -> None:
    world.answer = b"x" * (4 << 20) + b"\n"
    with world.connect(STATUS) as sock:
        assert sock.recv(1)  # the answer has begun, and with it its time
        world.answer = succeeded(0)
        assert world.ask() == OK
        world.seconds += 101
        sock.recv(1 << 18)  # there is room for some more, after the time is up
        world.wait_until(world.control.is_empty)
        with sock.makefile("rb") as stream:
            assert not stream.read().endswith(b"\n")


def test_who_hangs_up_is_not_waited_for(world: _World) -> None:
    world.done.clear()
    with world.connect(STATUS):
        world.wait_until(lambda: world.commands)
        assert not world.control.is_empty()

    world.wait_until(world.control.is_empty)


def test_who_has_only_said_all_gets_the_answer(world: _World) -> None:
    world.done.clear()
    with world.connect(STATUS) as sock:
        sock.shutdown(socket.SHUT_WR)
        world.wait_until(lambda: world.commands)
        world.done.set()
        assert _answer(sock) == OK


@pytest.mark.parametrize(
    ("error", "message", "is_logged"),
    [
        pytest.param(StateFull("no room"), "server state unavailable: no room", False, id="ours"),
        pytest.param(
            OSError(errno.EIO, os.strerror(errno.EIO)), "internal error", True, id="system"
        ),
        pytest.param(BrokenPipeError(), "internal error", True, id="looks-like-the-peer"),
        pytest.param(ZeroDivisionError(), "internal error", True, id="defect"),
    ],
)
def test_what_cannot_be_carried_out_is_answered_in_a_line(
    world: _World,
    error: Exception,
    message: str,
    is_logged: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world.error = error

    assert world.ask() == _failed(message)
    assert any(record.exc_info for record in caplog.records) is is_logged


@pytest.mark.parametrize(
    ("request_", "level", "line"),
    [
        pytest.param({"action": "status"}, "DEBUG", "control: {answer}", id="status"),
        pytest.param({"action": "list"}, "DEBUG", "control: list", id="list"),
        pytest.param(
            {"action": "unregister", "transfer_id": "x"}, "INFO", "control: {answer}", id="other"
        ),
        pytest.param(
            {"action": "register", "transfer_id": "x", "config": {"socket": "/s", "odd": 1}},
            "WARNING",
            "control: {answer}",
            id="ignored-field",
        ),
    ],
)
def test_what_was_done_is_logged(
    world: _World,
    request_: dict[str, object],
    level: str,
    line: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, module.__name__)
    world.ask(json.dumps(request_).encode() + b"\n")

    answer = world.answer.decode().rstrip()
    assert [(record.levelname, record.message) for record in caplog.records] == [
        (level, line.format(answer=answer))
    ]
    assert type(world.commands[0]) in {Status, List, Unregister, Register}


# Who may, and how many


def test_a_stranger_is_refused_by_name(
    world: _World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Peer(os.geteuid() + 7, frozenset())
    monkeypatch.setattr(module, "peer_of", lambda _: stranger)

    assert world.ask() == _failed("permission denied")
    assert caplog.messages == [f"control: refused: uid={stranger.uid}"]
    assert world.commands == []


def test_a_peer_is_known_by_its_user_and_groups() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == Peer(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def test_one_peer_too_many_is_told_to_come_back(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_PEERS", 2)
    with world.connect(), world.connect(), world.connect() as third:
        assert json.loads(third.recv(1000)) == _failed("server busy")
    world.wait_until(world.control.is_empty)
    assert world.ask() == OK


# Stopping


def test_a_server_that_stops_hangs_up_on_the_silent_and_serves_the_others(world: _World) -> None:
    world.done.clear()
    with world.connect(STATUS) as served, world.connect() as silent:
        world.wait_until(lambda: len(world.control._peers) == 2 and world.commands)
        world.control.close_silent()
        assert silent.recv(100) == b""
        world.done.set()
        assert _answer(served) == OK
