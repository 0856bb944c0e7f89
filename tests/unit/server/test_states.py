# SPDX-License-Identifier: Apache-2.0
"""Every transition of the table is taken, by the thread that the table names, and no other is.

A real loop and real pools over sockets; the test is the loop's thread, and sets its clock.
"""

import contextlib
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from gunicorn.config import Config

from imageserver.core.errors import ClientGone
from imageserver.server import loop as module
from imageserver.server import pools
from imageserver.server.accepting import Acceptors, AcceptPolicy
from imageserver.server.connection import LINGER_SECONDS, Connection
from imageserver.server.loop import Loop, Timeouts
from imageserver.server.pools import Pools
from imageserver.server.states import TRANSITIONS, Deadline, State, Thread
from imageserver.server.tls import server_context
from imageserver.server.wire import LOOKS
from imageserver.settings import Settings
from tests.unit.server.test_loop import Counted
from tests.unit.shortages import no_threads

if TYPE_CHECKING:
    from imageserver.observability.metrics.counted import Metrics

ROOT = Path(__file__).parents[3]
CLIENT_TIMEOUT, KEEPALIVE = 8.0, 20.0
#: More than a socket's buffers hold over loopback.
LARGE = bytes(16 << 20)
SECONDS = {
    Deadline.HEAD: CLIENT_TIMEOUT,
    Deadline.KEEPALIVE: KEEPALIVE,
    Deadline.PROGRESS: CLIENT_TIMEOUT / LOOKS,
    Deadline.LINGER: LINGER_SECONDS,
}

Edge = tuple[State, State]
EDGES: dict[Edge, tuple[Thread, Deadline]] = {
    (old, new): row for old, followers in TRANSITIONS.items() for new, row in followers.items()
}


def _request(path: str = "/", method: str = "GET", extra: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n".encode()


class _World:
    """A worker without its process, one client, and the transitions of its connection."""

    def __init__(self, context: ssl.SSLContext | None) -> None:
        self.seconds = 1000.0
        self.taken: list[tuple[Edge, Thread]] = []
        #: By transition: how many seconds the new state may last.
        self.limits: dict[Edge, float] = {}
        #: Called before a connection is dispatched.
        self.before_dispatch: Callable[[Connection], object] = lambda _: None
        metrics = cast("Metrics", Counted())
        self.pools = Pools(1, 60.0, lambda: None, metrics)
        self.loop = Loop(
            Timeouts(CLIENT_TIMEOUT, KEEPALIVE), self._dispatch, metrics, lambda: self.seconds
        )
        self.acceptors = Acceptors(self.loop, lambda _: 0.0, metrics)
        listener = socket.create_server(("127.0.0.1", 0))
        self.acceptors.listen(listener, AcceptPolicy(context))
        cfg = Config()
        cfg.set("http_parser", "python")
        self.pools.start(self._app, cfg, self.loop)
        self.client = socket.create_connection(listener.getsockname(), 10)

    def _dispatch(self, conn: Connection) -> None:
        self.before_dispatch(conn)
        self.pools.dispatch(conn)

    def _app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/gone":
            raise ClientGone
        body = LARGE if environ["PATH_INFO"] == "/large" else b"ok"
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def record(self, conn: Connection, old: State) -> None:
        is_loop = threading.current_thread() is threading.main_thread()
        self.taken.append(((old, conn.state), Thread.LOOP if is_loop else Thread.POOL))

    @property
    def conn(self) -> Connection:
        (conn,) = self.loop._waiting.values()
        return conn

    def until(self, old: State, new: State) -> None:
        """Let the loop work until a transition has been taken."""
        deadline = time.monotonic() + 10
        while (old, new) not in [edge for edge, _ in self.taken]:
            assert time.monotonic() < deadline, self.taken
            self.loop.step()
        while self.pools._handovers and new is not State.QUEUED:
            assert time.monotonic() < deadline, self.taken
            time.sleep(0.001)

    def send(self, data: bytes, old: State, new: State) -> None:
        self.client.sendall(data)
        self.until(old, new)

    def connect(self) -> None:
        self.until(State.ACCEPTED, State.HEAD)

    def become_idle(self) -> None:
        self.connect()
        self.send(_request(), State.WORK, State.IDLE)

    def fill(self, conn: Connection) -> None:
        """Fill the connection's socket: nothing more can be sent at once."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        last = time.monotonic()
        while time.monotonic() < last + 0.02:  # the kernel moves bytes on for a moment
            with contextlib.suppress(BlockingIOError):
                conn.sock.send(LARGE)
                last = time.monotonic()

    def have_no_room(self) -> None:
        self.pools._transfers.room = 0

    def drain(self, old: State, new: State) -> None:
        """Take the answer until a transition has been taken."""
        self.client.settimeout(0)
        deadline = time.monotonic() + 10
        while (old, new) not in [edge for edge, _ in self.taken]:
            assert time.monotonic() < deadline, self.taken
            with contextlib.suppress(BlockingIOError):
                while self.client.recv(1 << 20):
                    pass
            self.loop.step()

    def reset(self, _conn: object = None) -> None:
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.close()

    def close(self) -> None:
        self.client.close()
        self.pools.last = True
        self.pools.abort(10)
        self.acceptors.close()
        self.loop.close_all()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    subprocess.run([ROOT / "scripts" / "make-pki", directory], check=True)
    return directory


@pytest.fixture
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_World]:
    monkeypatch.setattr(module, "TICK", 0.0)
    monkeypatch.setattr(pools, "PROBE_THREADS", 1)
    monkeypatch.setattr(pools, "ASKING_THREADS", 1)
    context = None
    if State.HANDSHAKE in request.node.callspec.params["edge"]:
        pki = request.getfixturevalue("pki")
        settings = Settings(tls_cert=str(pki / "server.crt"), tls_key=str(pki / "server.key"))
        context = server_context(settings)
    made = _World(context)
    move, enter = Connection.move, Loop._enter

    def recorded(conn: Connection, new: State) -> Deadline:
        old = conn.state
        deadline = move(conn, new)
        made.record(conn, old)
        return deadline

    def timed(loop: Loop, state: State, conn: Connection) -> None:
        old = conn.state
        enter(loop, state, conn)
        made.limits[old, state] = conn.deadline - made.seconds

    monkeypatch.setattr(Connection, "move", recorded)
    monkeypatch.setattr(Loop, "_enter", timed)
    yield made
    made.close()


def _handshake(world: _World) -> None:
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    world.until(State.ACCEPTED, State.HANDSHAKE)
    world.seconds += 3
    world.client.settimeout(0)
    world.client = client = trusting.wrap_socket(world.client, do_handshake_on_connect=False)
    for _ in range(1000):
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
            break
        world.loop.step()
    world.until(State.HANDSHAKE, State.HEAD)
    assert world.limits[State.HANDSHAKE, State.HEAD] == CLIENT_TIMEOUT - 3


def _from_head(world: _World, new: State, *, is_full: bool = False) -> None:
    """Begin a head that is never completed."""
    world.connect()
    world.client.sendall(b"GET /")
    while not world.conn.buffer:
        world.loop.step()
    if is_full:
        world.fill(world.conn)
    world.seconds += CLIENT_TIMEOUT
    world.until(State.HEAD, new)


def _from_idle(world: _World, new: State, *, is_full: bool = False) -> None:
    """Ask for what there is no thread for."""
    world.become_idle()
    world.have_no_room()
    if is_full:
        world.fill(world.conn)
    world.send(_request(), State.IDLE, new)


def _from_queued(
    world: _World, new: State, before: Callable[[Connection], object] = lambda _: None
) -> None:
    """Ask where no thread is to be had."""
    world.connect()
    world.before_dispatch = before
    with no_threads():
        world.send(_request(), State.QUEUED, new)


def _from_work(world: _World, requests: bytes, new: State) -> None:
    world.connect()
    world.send(requests, State.WORK, new)


def _from_sending(world: _World, requests: bytes, new: State) -> None:
    _from_work(world, requests, State.SENDING)
    world.drain(State.SENDING, new)


def _refuse_again(world: _World) -> None:
    """Refuse the request behind one whose answer has just been taken, and not be heard."""
    _from_work(world, 2 * _request("/large"), State.SENDING)
    world.have_no_room()
    world.before_dispatch = world.fill
    world.drain(State.SENDING, State.SENDING)


def _leave(world: _World, old: State) -> None:
    world.client.close()
    world.until(old, State.CLOSED)


S = State
#: How each transition comes about.
SCENARIOS: dict[Edge, Callable[[_World], object]] = {
    (S.ACCEPTED, S.HANDSHAKE): lambda w: w.until(S.ACCEPTED, S.HANDSHAKE),
    (S.ACCEPTED, S.HEAD): lambda w: w.connect(),
    (S.HANDSHAKE, S.HEAD): _handshake,
    (S.HANDSHAKE, S.LINGER): lambda w: w.send(_request(), S.HANDSHAKE, S.LINGER),
    (S.HANDSHAKE, S.CLOSED): lambda w: _leave(w, S.HANDSHAKE),
    (S.HEAD, S.QUEUED): lambda w: (w.connect(), w.send(_request(), S.HEAD, S.QUEUED)),
    (S.HEAD, S.SENDING): lambda w: _from_head(w, S.SENDING, is_full=True),
    (S.HEAD, S.LINGER): lambda w: _from_head(w, S.LINGER),
    (S.HEAD, S.CLOSED): lambda w: (w.connect(), _leave(w, S.HEAD)),
    (S.IDLE, S.HEAD): lambda w: (w.become_idle(), w.send(b"G", S.IDLE, S.HEAD)),
    (S.IDLE, S.QUEUED): lambda w: (w.become_idle(), w.send(_request(), S.IDLE, S.QUEUED)),
    (S.IDLE, S.SENDING): lambda w: _from_idle(w, S.SENDING, is_full=True),
    (S.IDLE, S.LINGER): lambda w: _from_idle(w, S.LINGER),
    (S.IDLE, S.CLOSED): lambda w: (w.become_idle(), _leave(w, S.IDLE)),
    (S.QUEUED, S.WORK): lambda w: (w.connect(), w.send(_request(), S.QUEUED, S.WORK)),
    (S.QUEUED, S.SENDING): lambda w: _from_queued(w, S.SENDING, w.fill),
    (S.QUEUED, S.LINGER): lambda w: _from_queued(w, S.LINGER),
    (S.QUEUED, S.CLOSED): lambda w: _from_queued(w, S.CLOSED, w.reset),
    (S.WORK, S.HEAD): lambda w: _from_work(w, _request() + b"GET /", S.HEAD),
    (S.WORK, S.IDLE): lambda w: w.become_idle(),
    (S.WORK, S.QUEUED): lambda w: _from_work(w, _request(method="HEAD") + _request(), S.QUEUED),
    (S.WORK, S.SENDING): lambda w: _from_work(w, _request("/large"), S.SENDING),
    (S.WORK, S.LINGER): lambda w: _from_work(w, _request(extra="Connection: close\r\n"), S.LINGER),
    (S.WORK, S.CLOSED): lambda w: _from_work(w, _request("/gone"), S.CLOSED),
    (S.SENDING, S.HEAD): lambda w: _from_sending(w, _request("/large") + b"GET", S.HEAD),
    (S.SENDING, S.IDLE): lambda w: _from_sending(w, _request("/large"), S.IDLE),
    (S.SENDING, S.QUEUED): lambda w: _from_sending(w, _request("/large") * 2, S.QUEUED),
    (S.SENDING, S.SENDING): _refuse_again,
    (S.SENDING, S.LINGER): lambda w: _from_sending(
        w, _request("/large", extra="Connection: close\r\n"), S.LINGER
    ),
    (S.SENDING, S.CLOSED): lambda w: (
        _from_work(w, _request("/large"), S.SENDING),
        _leave(w, S.SENDING),
    ),
    (S.LINGER, S.CLOSED): lambda w: (_from_head(w, S.LINGER), _leave(w, S.LINGER)),
}


def _name(edge: Edge) -> str:
    return f"{edge[0].name}-{edge[1].name}"


def test_the_table_has_a_row_for_each_state_and_the_scenarios_one_for_each_transition() -> None:
    assert set(TRANSITIONS) == set(State)
    assert set(SCENARIOS) == set(EDGES)


@pytest.mark.parametrize("edge", SCENARIOS, ids=_name)
def test_a_transition_is_taken_by_the_thread_that_the_table_names(
    world: _World, edge: Edge
) -> None:
    SCENARIOS[edge](world)

    who, deadline = EDGES[edge]
    assert all(thread in who for taken, thread in world.taken if taken == edge)
    assert world.limits.get(edge) == (
        CLIENT_TIMEOUT - 3 if deadline is Deadline.UNCHANGED else SECONDS.get(deadline)
    )
    for taken, thread in world.taken:  # on the way there
        assert thread in EDGES[taken][0], taken


@pytest.mark.parametrize("edge", [(State.QUEUED, State.LINGER)], ids=_name)
def test_a_pool_thread_refuses_what_it_finds_no_thread_for(world: _World, edge: Edge) -> None:
    world.connect()
    with no_threads():
        world.send(_request(method="HEAD") + _request(), *edge)

    assert world.taken[-1] == (edge, Thread.POOL)
