# SPDX-License-Identifier: Apache-2.0
"""Threads over a real loop and Unix sockets: who takes one, and who is served meanwhile."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from gunicorn.config import Config

from imageserver.images.probing import Asking, WouldTransfer, WouldWait
from imageserver.server import pools as module
from imageserver.server.accepting import Acceptors, AcceptPolicy
from imageserver.server.loop import Loop, Timeouts
from imageserver.server.pools import ASKING_THREADS, PROBE_THREADS, Pools
from imageserver.server.threads import NoThread
from imageserver.web.body import ASKING
from tests.unit.exchanges import Line
from tests.unit.server.test_loop import REQUEST, Counted
from tests.unit.shortages import no_threads

if TYPE_CHECKING:
    from imageserver.observability.metrics.counted import Metrics

#: More than a Unix socket's buffers hold.
LARGE = bytes(1 << 20)
THREADS = 2


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class _World:
    """A worker's threads, without the worker; each path of the application is a function."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.asked: list[str] = []
        self.paths: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "/large": lambda _: LARGE,
            "/hung": self._hang,
        }
        self.go_on = threading.Event()
        metrics = cast("Metrics", Counted())
        self.pools = Pools(THREADS, 60.0, lambda: None, metrics)
        self._loop = Loop(Timeouts(60.0, 60.0), self.pools.dispatch, metrics)
        self._acceptors = Acceptors(self._loop, lambda _: 0.0, metrics)
        listener = socket.create_server(str(path), family=socket.AF_UNIX)
        self._acceptors.listen(listener, AcceptPolicy())
        cfg = Config()
        cfg.set("http_parser", "python")
        self.pools.start(self._app, cfg, self._loop)
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended:
            self._loop.step()

    def _app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        self.asked.append(path)
        body = self.paths.get(path, lambda _: b"ok")(environ)
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]

    def _hang(self, environ: dict[str, Any]) -> bytes:
        """Do as an image does whose server hangs."""
        if environ[ASKING] is Asking.ELSEWHERE:
            raise WouldWait
        if environ[ASKING] is Asking.NOW:
            assert self.go_on.wait(20)
        return str(environ[ASKING].name).encode()

    def send(self, method: str, path: str, times: int = 1, extra: str = "") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(10)
        client.connect(str(self._path))
        client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n".encode() * times)
        return client

    def seconds(self, method: str, path: str) -> float:
        """Return how long it takes until a request is answered."""
        began = time.monotonic()
        with self.send(method, path) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")
        return time.monotonic() - began

    def wait_for(self, count: int, path: str) -> None:
        _until(lambda: self.asked.count(path) >= count)

    def close(self) -> None:
        self.go_on.set()
        self.pools.last = True
        self.pools.abort(10)
        self._ended = True
        self._thread.join()
        self._acceptors.close()
        self._loop.close_all()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_World]:
    monkeypatch.setattr("imageserver.server.loop.TICK", 0.01)
    made = _World(tmp_path / "socket")
    yield made
    made.close()


def _thread(_environ: dict[str, Any]) -> bytes:
    """Answer with what the thread is called."""
    return threading.current_thread().name.partition("_")[0].encode()


def _body(client: socket.socket) -> bytes:
    return client.recv(1000).partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize(
    ("method", "threads"), [("OPTIONS", PROBE_THREADS), ("GET", THREADS)], ids=str
)
def test_clients_that_take_no_answer_keep_no_thread(
    world: _World, method: str, threads: int
) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(2 * threads):
            stack.enter_context(world.send(method, "/large", times=5))
            world.wait_for(number + 1, "/large")
            _until(world.pools.is_empty)

        assert world.seconds(method, "/small") < 1
        # One answer each: the next request waits until its client has taken the last.
        assert world.asked.count("/large") == 2 * threads


def test_probes_that_wait_for_a_back_end_keep_no_other_waiting(world: _World) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2 * ASKING_THREADS + PROBE_THREADS):
            stack.enter_context(world.send("HEAD", "/hung"))
        world.wait_for(3 * ASKING_THREADS + PROBE_THREADS, "/hung")  # many were put off

        assert world.seconds("OPTIONS", "/quick") < 1
        assert world.seconds("GET", "/quick") < 1


def test_a_probe_that_waits_is_answered_by_a_thread_that_may(world: _World) -> None:
    world.go_on.set()
    with world.send("OPTIONS", "/hung") as client:
        assert _body(client) == b"NOW"
        client.sendall(b"OPTIONS /quick HTTP/1.1\r\nHost: x\r\n\r\n")
        assert _body(client) == b"ok"


@pytest.mark.parametrize(
    ("put_off", "thread"), [(None, b"probe"), (WouldWait, b"asking"), (WouldTransfer, b"transfer")]
)
def test_a_probe_is_answered_by_a_thread_that_may_take_as_long(
    world: _World, put_off: type[Exception] | None, thread: bytes
) -> None:
    def probe(environ: dict[str, Any]) -> bytes:
        if put_off and environ[ASKING] is not Asking.NOW:
            raise put_off
        return _thread(environ)

    world.paths["/probe"] = probe
    with world.send("OPTIONS", "/probe") as client:
        assert _body(client) == thread


def test_the_next_probe_is_made_where_the_last_one_was_asked_for(world: _World) -> None:
    world.go_on.set()
    with world.send("HEAD", "/hung", times=20) as client, client.makefile("rb") as stream:
        for _ in range(20):
            while stream.readline() != b"\r\n":
                pass

    assert world.asked == ["/hung"] * 21


def test_a_probe_that_found_no_such_thread_for_long_is_answered_without(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ASKING_SECONDS", 0.0)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(world.send("OPTIONS", "/hung")) for _ in range(40)]

        assert {_body(client) for client in clients} == {b"NEVER"}


def test_a_client_that_asks_much_in_advance_lets_others_in(world: _World) -> None:
    world.paths["/endless"] = lambda _: str(world.go_on.wait(20)).encode()
    count = 8 * PROBE_THREADS
    with contextlib.ExitStack() as stack:
        for _ in range(PROBE_THREADS):
            stack.enter_context(world.send("OPTIONS", "/endless", times=count))
        world.wait_for(PROBE_THREADS, "/endless")
        other = stack.enter_context(world.send("OPTIONS", "/other"))
        _until(lambda: len(world.pools._probes.connections) > PROBE_THREADS)
        world.go_on.set()

        assert _body(other) == b"ok"
    assert world.asked.index("/other") < PROBE_THREADS * count / 2


def test_a_thread_keeps_a_connection_whose_client_thinks_for_a_moment(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONG_WAIT_MS", 10_000)
    world.paths["/who"] = lambda _: threading.current_thread().name.encode()
    with world.send("OPTIONS", "/who") as client:
        first = _body(client)
        _until(lambda: bool(world.pools._probes.between_requests))
        assert world.seconds("OPTIONS", "/other") < 1  # which others do not wait for
        client.sendall(b"OPTIONS /who HTTP/1.1\r\nHost: x\r\n\r\n")
        assert _body(client) == first

    _until(world.pools.is_empty)  # at once when the client closes


@pytest.mark.parametrize(
    ("connections", "is_short", "milliseconds"),
    [(1, False, 20), (4, False, 20), (5, False, 1), (1, True, 1)],
)
def test_threads_wait_longer_for_clients_only_where_half_of_them_are_free(
    connections: int, is_short: bool, milliseconds: int
) -> None:
    pool = module._Pool("test", 8, 8)
    pool._threads.is_short = is_short
    pool.connections = {cast("Any", number) for number in range(connections)}

    assert pool.wait_ms() == milliseconds


@pytest.mark.parametrize(
    ("room", "between", "waits"), [(2, 0, False), (2, 1, True), (3, 0, True), (3, 1, True)]
)
def test_work_waits_for_a_thread_that_is_there_where_room_or_such_a_thread_is_kept_for_it(
    room: int, between: int, waits: bool
) -> None:
    pool, go_on = module._Pool("test", 2, room), threading.Event()
    pool.submit(go_on.wait, 10)
    pool.between_requests = {cast("Any", number) for number in range(between)}

    with no_threads(), contextlib.nullcontext() if waits else pytest.raises(NoThread):
        pool.submit(int)
    go_on.set()


@pytest.mark.parametrize(
    ("connections", "is_last", "sent", "has_next"),
    [
        pytest.param(1, False, REQUEST, True, id="whole"),
        pytest.param(1, False, REQUEST[:9], False, id="a-part"),
        pytest.param(1, False, b"", False, id="not-even-a-record"),
        pytest.param(2, False, REQUEST, False, id="wanted-elsewhere"),
        pytest.param(1, True, REQUEST, False, id="draining"),
    ],
)
def test_a_thread_goes_on_with_a_whole_head_unless_it_is_wanted_elsewhere_or_drains(
    line: Line, connections: int, is_last: bool, sent: bytes, has_next: bool
) -> None:
    pools = Pools(1, 60.0, lambda: None, cast("Metrics", Counted()))
    pools.last = is_last
    pools._transfers.connections = {cast("Any", number) for number in range(connections)}
    line.client.sendall(sent)
    arrival = cast("Any", SimpleNamespace(poll=lambda _: True))

    assert pools._has_next(pools._transfers, line.conn, arrival) is has_next
