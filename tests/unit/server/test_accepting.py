# SPDX-License-Identifier: Apache-2.0
"""Who is let in, by which worker, and who has to go for it, over real sockets and a set clock."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from imageserver.server import loop as module
from imageserver.server.accepting import Acceptors, AcceptPolicy
from imageserver.server.connection import Connection
from imageserver.server.loop import Loop, Timeouts

if TYPE_CHECKING:
    from imageserver.observability.metrics.counted import Metrics


class _World:
    """A worker that accepts; it stands in for the metrics, too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = 1000.0
        #: Seconds for which the worker leaves new connections to others; how often it was asked.
        self.delay = 0.0
        self.asked = 0
        self.fresh: list[bool] = []
        self.counted: list[str] = []
        metrics = cast("Metrics", self)
        self.loop = Loop(Timeouts(8, 20), lambda _: None, metrics, lambda: self.seconds)
        self.acceptors = Acceptors(self.loop, self._accept_delay, metrics, lambda: self.seconds)
        self.listener = socket.create_server(str(path), family=socket.AF_UNIX)
        self.clients: list[socket.socket] = []

    def accepted(self) -> None:
        self.counted.append("accepted")

    def turned_away(self, reason: str) -> None:
        self.counted.append(reason)

    def _accept_delay(self, has_fresh: bool) -> float:
        self.asked += 1
        self.fresh.append(has_fresh)
        return self.delay

    def listen(self, **policy: Any) -> None:
        self.acceptors.listen(self.listener, AcceptPolicy(**policy))

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        client.connect(str(self._path))
        self.clients.append(client)
        self.loop.step()
        return client

    def queue(self, count: int) -> None:
        """Have so many clients come, who say nothing."""
        for _ in range(count):
            self.clients.append(socket.socket(socket.AF_UNIX))
            self.clients[-1].connect(str(self._path))

    def pause(self) -> int:
        """Let a pause before accepting begin, and end; return how many were accepted then."""
        before, self.delay = len(self.waiting), 0.001
        self.loop.step()
        self.seconds += 0.001
        self.loop.step()
        return len(self.waiting) - before

    @property
    def waiting(self) -> list[Connection]:
        return list(self.loop._waiting.values())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_World]:
    monkeypatch.setattr(module, "TICK", 0.0)
    made = _World(tmp_path / "socket")
    yield made
    made.acceptors.close()
    made.loop.close_all()
    for client in made.clients:
        client.close()


def test_a_connection_is_let_in_and_counted(world: _World) -> None:
    world.listen()
    world.connect()

    assert (len(world.waiting), world.counted) == (1, ["accepted"])
    (conn,) = world.waiting
    assert (conn.client, conn.listener) == ("unix", world.listener.getsockname())


def test_a_busy_worker_leaves_a_connection_to_others_once_and_takes_it_then(
    world: _World,
) -> None:
    world.listen()
    world.delay = 0.05
    world.connect()
    world.loop.step()
    assert (world.waiting, world.asked) == ([], 1)

    world.seconds += 0.06
    world.loop.step()
    assert (len(world.waiting), world.asked) == (1, 1)


def test_a_worker_that_has_just_accepted_says_so_until_a_request_comes_or_5_ms_are_over(
    world: _World,
) -> None:
    world.listen()
    world.connect()
    world.connect()
    world.connect()
    (*_, latest) = world.waiting
    latest.requests = 1
    world.connect()
    world.seconds += 0.006
    world.connect()

    assert world.fresh == [False, True, True, False, False]


def test_after_each_pause_that_brings_no_request_one_more_is_let_in(world: _World) -> None:
    world.listen()
    world.queue(40)

    assert [world.pause() for _ in range(8)] == [1, 1, 2, 3, 4, 5, 6, 7]
    world.queue(100)
    assert [world.pause() for _ in range(10)] == [8, 9, 10, 11, 12, 13, 14, 15, 16, 3]


def test_a_request_or_a_longer_wait_has_them_let_in_one_by_one_again(world: _World) -> None:
    world.listen()
    world.queue(40)

    assert [world.pause() for _ in range(4)] == [1, 1, 2, 3]
    world.waiting[-1].requests = 1
    assert [world.pause() for _ in range(4)] == [1, 1, 2, 3]
    world.seconds += 0.006
    assert [world.pause() for _ in range(4)] == [1, 1, 2, 3]
    world.delay = 0.0
    world.loop.step()
    assert [world.pause() for _ in range(4)] == [1, 2, 3, 4]


def test_a_request_that_comes_during_the_pause_counts(world: _World) -> None:
    world.listen()
    world.queue(40)

    assert [world.pause() for _ in range(4)] == [1, 1, 2, 3]
    world.loop.step()
    world.waiting[-1].requests = 1
    assert world.pause() == 1


def test_what_another_worker_took_meanwhile_is_no_error(world: _World) -> None:
    world.listen()
    world.delay = 0.05
    world.connect()
    world.listener.accept()[0].close()

    world.seconds += 0.06
    world.loop.step()
    assert (world.waiting, world.counted) == ([], [])


def test_where_connections_are_not_spread_none_is_left_or_counted(world: _World) -> None:
    world.listen(spreads=False)
    world.delay = 0.05
    world.connect()

    assert (len(world.waiting), world.asked, world.counted) == (1, 0, [])


def test_a_stranger_is_not_let_in(world: _World) -> None:
    world.listen(admits=lambda _: False)

    assert world.connect().recv(1) == b""
    assert (world.waiting, world.counted) == ([], ["not_admitted"])


def test_one_connection_too_many_closes_the_one_with_the_least_time_left(world: _World) -> None:
    world.listen(spreads=False)
    world.loop.most_waiting = 2
    first = world.connect()
    world.seconds += 1
    world.connect()
    world.connect()

    assert first.recv(1) == b""
    assert (len(world.waiting), world.counted) == (2, ["too_many"])


@pytest.mark.parametrize("said", [b"", b"G"], ids=["silent", "begun"])
def test_a_new_client_is_heard_where_slow_heads_take_every_place(
    world: _World, said: bytes
) -> None:
    world.listen(spreads=False)
    world.loop.most_waiting = 4
    slow = [world.connect() for _ in range(4)]
    for client in slow:
        client.sendall(said)
        world.loop.step()
    world.seconds += 2
    client = world.connect()
    world.connect()
    client.sendall(b"O")
    world.loop.step()

    assert [each.recv(1) for each in slow[:2]] == [b"", b""]
    assert [bytes(conn.buffer) for conn in world.waiting] == [said, said, b"O", b""]


def test_a_client_that_comes_while_newer_ones_fill_every_place_closes_the_oldest_of_them(
    world: _World,
) -> None:
    world.listen(spreads=False)
    world.loop.most_waiting = 4
    first, *_ = [world.connect() for _ in range(5)]

    assert (first.recv(1), len(world.waiting)) == (b"", 4)


def test_of_many_places_several_are_freed_at_once(world: _World) -> None:
    world.listen(spreads=False)
    world.loop.most_waiting = 192
    first, second, third, *_ = [world.connect() for _ in range(193)]

    assert [each.recv(1) for each in (first, second, third)] == [b"", b"", b""]
    assert (len(world.waiting), world.counted) == (190, ["too_many"] * 3)
    world.connect()
    assert (len(world.waiting), world.counted) == (191, ["too_many"] * 3)


def test_a_worker_that_accepts_no_more_frees_its_address_and_keeps_its_connections(
    world: _World,
) -> None:
    world.listen()
    world.connect()
    world.delay = 0.05
    world.connect()  # left to others for a moment
    world.acceptors.close()
    world.seconds += 0.06
    world.loop.step()

    assert (len(world.waiting), world.listener.fileno()) == (1, -1)
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(world._path))
