# SPDX-License-Identifier: Apache-2.0
"""A worker without descriptors or threads: who goes, who is told to come back, what is logged."""

import errno
import json
import logging
import os
import resource
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from gunicorn.config import Config

from imageserver.backends.file.image import ImageFiles
from imageserver.backends.file.kind import FileImage
from imageserver.core.errors import Exhausted
from imageserver.core.ports import Intent
from imageserver.server import loop as module
from imageserver.server.accepting import Acceptors, AcceptPolicy
from imageserver.server.control import ControlServer
from imageserver.server.loop import MOST_WAITING, Loop, Timeouts
from imageserver.server.pools import Pools
from imageserver.server.shortage import LimitedWarnings, Reserve
from imageserver.server.states import State
from imageserver.server.worker import most_waiting
from tests.unit.shortages import no_descriptors, no_threads, open_descriptors

if TYPE_CHECKING:
    from imageserver.server.connection import Connection

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Counted:
    """Metrics that count nothing but what was refused or turned away."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def refused(self, reason: str) -> None:
        self.reasons.append(reason)

    turned_away = refused

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


class Full:
    """A listening socket whose process has no descriptor for so many times."""

    def __init__(self, listener: socket.socket, times: int) -> None:
        self._listener = listener
        self.times = times
        self.asked = 0

    def accept(self) -> tuple[socket.socket, object]:
        self.asked += 1
        if self.times:
            self.times -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._listener.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


class World:
    """A loop that accepts, and its clients."""

    def __init__(self, path: Path) -> None:
        self.seconds = 1000.0
        self.counted = Counted()
        self.dispatched: list[Connection] = []
        self.dispatch: Callable[[Connection], None] = self.dispatched.append
        self.loop = Loop(
            Timeouts(50.0, 100.0),
            lambda conn: self.dispatch(conn),  # noqa: PLW0108 - whatever it is by then
            cast("Any", self.counted),
            lambda: self.seconds,
        )
        self.acceptors = Acceptors(self.loop, lambda _: 0.0, cast("Any", self.counted))
        self.path = path
        self.listener = Full(socket.create_server(str(path), family=socket.AF_UNIX), 0)
        self.acceptors.listen(self.listener, AcceptPolicy(spreads=False))
        self.clients: list[socket.socket] = []

    def client(self, data: bytes = b"") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        client.connect(str(self.path))
        client.sendall(data)
        self.clients.append(client)
        for _ in range(8):
            self.loop.step()
        return client

    def idle_client(self) -> socket.socket:
        """Return a client that has been answered."""
        client = self.client(REQUEST)
        conn = self.dispatched.pop()
        conn.move(State.QUEUED)
        conn.move(State.WORK)
        conn.buffer.clear()
        self.loop.keep(conn)
        return client

    def have_no_reserve(self) -> None:
        reserve = self.loop._reserve
        reserve.fill = lambda _: None  # type: ignore[method-assign]
        while reserve.spend():
            pass

    def step_until(self, what: Callable[[], object]) -> None:
        """Step until something is so, which must be soon."""
        for _ in range(10):
            if what():
                return
            self.loop.step()
        raise AssertionError

    def is_open(self, client: socket.socket) -> bool:
        return not select.select([client], [], [], 0)[0]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(module, "TICK", 0.01)
    made = World(tmp_path / "sock")
    yield made
    made.acceptors.close()
    made.loop.close_all()
    while made.loop._reserve.spend():
        pass
    for sock in (*made.clients, *(conn.sock for conn in made.dispatched)):
        sock.close()


# Connections where descriptors run out


def test_where_descriptors_run_out_the_idle_one_with_the_least_time_left_goes(world):
    idle = [world.idle_client(), world.idle_client()]
    others = [world.client(b"GET"), world.client()]
    world.have_no_reserve()  # and needs none
    world.listener.times = 1
    client = world.client(REQUEST)

    assert [world.is_open(each) for each in (*others, *idle)] == [True, True, False, True]
    (conn,) = world.dispatched
    assert conn.buffer == REQUEST
    assert world.is_open(client)
    assert world.counted.reasons == ["no_descriptor"]


def test_a_head_that_has_begun_goes_where_nobody_is_idle(world):
    begun = [world.client(b"GET"), world.client(b"GET")]
    world.listener.times = 1
    world.client(REQUEST)

    assert [world.is_open(each) for each in begun] == [False, True]
    assert len(world.dispatched) == 1


def test_descriptors_that_were_held_back_let_connections_in_though_nobody_waits(world):
    world.loop._reserve.fill(2)
    world.listener.times = 3
    world.client(REQUEST)

    assert len(world.dispatched) == 1


def test_where_nothing_can_be_freed_accepting_rests_and_the_log_stays_short(world, caplog):
    caplog.set_level(logging.WARNING)
    world.have_no_reserve()
    world.listener.times = 1 << 30
    world.client(REQUEST)

    assert world.listener.asked == 1
    world.seconds += 0.1
    world.loop.step()
    assert world.listener.asked == 2
    world.listener.times = 0
    world.seconds += 0.1
    world.step_until(lambda: world.dispatched)
    assert len(world.dispatched) == 1
    said = "no file descriptor is free for another connection"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_real_shortage_of_descriptors_closes_an_idle_connection(world):
    gap = os.dup(2)
    gone = world.client()
    idle = world.client()
    late = socket.socket(socket.AF_UNIX)
    world.clients.append(late)
    os.close(gap)
    with no_descriptors():
        late.connect(str(world.path))
        late.sendall(REQUEST)
        world.step_until(lambda: world.dispatched)

    assert len(world.dispatched) == 1
    assert (world.is_open(gone), world.is_open(idle)) == (False, True)


def test_connections_that_wait_leave_descriptors_to_transfers():
    assert most_waiting(1 << 20, 32) == MOST_WAITING
    assert most_waiting(resource.RLIM_INFINITY, 32) == MOST_WAITING
    assert most_waiting(1024, 32) == 576
    assert most_waiting(64, 32) == 16


@pytest.mark.parametrize("times", [1, 1 << 30])
def test_a_control_peer_that_finds_no_descriptor_makes_nobody_spin(world, tmp_path, times):
    idle = world.client()
    listener = Full(socket.create_server(str(tmp_path / "c"), family=socket.AF_UNIX), times)
    control = ControlServer(cast("Any", None), 5.0)
    control.listen(listener, world.loop)
    with socket.socket(socket.AF_UNIX) as peer, no_threads():
        peer.connect(str(tmp_path / "c"))
        for _ in range(12):
            world.loop.step()
        assert not world.is_open(idle)  # it made room
        assert listener.asked <= 8
        if times == 1:
            assert json.loads(peer.recv(1000)) == {"status": "error", "message": "server busy"}
    control.stop()
    assert control.is_empty()


@pytest.mark.parametrize("intent", [Intent.READ, Intent.REPLACE, Intent.INSPECT])
def test_a_file_that_finds_no_descriptor_is_not_called_unusable(tmp_path, intent):
    (tmp_path / "image").write_bytes(b"image")
    image = FileImage(str(tmp_path / "image"))
    files = ImageFiles(1 << 20)
    for free in range(1 if intent is Intent.READ else 2):
        with no_descriptors(free), pytest.raises(Exhausted):
            files.open(image, intent)
    before = open_descriptors()
    files.open(image, intent).close()
    assert open_descriptors() == before


# Requests where threads run out


@pytest.fixture
def pools(world: World) -> Pools:
    made = Pools(4, 5.0, lambda: None, cast("Any", world.counted))
    cfg = Config()
    cfg.set("http_parser", "python")

    def app(_environ: object, start_response: Callable[..., object]) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    made.start(app, cfg, world.loop)
    world.dispatch = made.dispatch
    return made


def test_a_request_that_finds_no_thread_is_told_to_come_back_and_the_next_is_served(world, pools):
    with no_threads():
        head = world.client(REQUEST).recv(1000)
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert b"Retry-After: 1\r\n" in head
    assert head.endswith(b'{"error":"server busy"}')
    assert (pools.is_empty(), pools.busy(), world.counted.reasons) == (True, 0, ["server_busy"])
    assert world.client(REQUEST).recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


def test_probes_are_answered_though_no_thread_is_to_be_had(world, pools):
    with no_threads():
        for _ in range(12):
            answer = world.client(REQUEST.replace(b"GET", b"OPTIONS")).recv(1000)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_replaced_file_is_freed_though_no_thread_is_to_be_had(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"image")
    file = ImageFiles(1 << 20).open(FileImage(str(path)), Intent.READ)
    path.unlink()
    before = len(open_descriptors())
    with no_threads():
        file.close()
    assert len(open_descriptors()) == before - 1


# What is held back, and what is told


def test_what_is_held_back_can_be_spent_once():
    reserve = Reserve()
    with no_descriptors(3):
        reserve.fill(2)
    spent = [reserve.spend() for _ in range(4)]
    assert spent == [True, True, True, False]


def test_warnings_come_seldom_and_say_how_many_are_left_out(caplog):
    seconds = 1000.0
    warnings = LimitedWarnings(logging.getLogger("x"), lambda: seconds)
    for _ in range(100):
        warnings.warn("no %s", "thread")
    seconds += 10
    warnings.warn("no %s", "thread")
    seconds += 10
    warnings.warn("no %s", "thread")

    assert caplog.messages == [
        "no thread",
        "no thread (and 99 times more since the last such line)",
        "no thread",
    ]
