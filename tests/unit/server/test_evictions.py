# SPDX-License-Identifier: Apache-2.0
"""Who is closed first where a worker has no place for another connection."""

from dataclasses import dataclass
from typing import Any, Self, cast

from imageserver.server.loop import Loop, Timeouts
from imageserver.server.states import State


@dataclass
class Waiting:
    """A connection, as far as it matters who is closed first."""

    state: State
    age: float
    left: float
    closed: bool = False

    @property
    def accepted_at(self) -> float:
        return 1000.0 - self.age

    @property
    def deadline(self) -> float:
        return 1000.0 + self.left

    @property
    def sock(self) -> Self:
        return self

    def fileno(self) -> int:
        return id(self)

    def close(self) -> None:
        self.closed = True


def test_who_waits_without_a_request_goes_before_new_clients_and_these_before_answers() -> None:
    loop = Loop(Timeouts(60, 75), lambda _: None, cast("Any", None), now=lambda: 1000.0)
    order = [
        Waiting(State.HEAD, age=58, left=2),
        Waiting(State.HANDSHAKE, age=55, left=5),
        Waiting(State.IDLE, age=0.5, left=74),
        Waiting(State.HEAD, age=0.9, left=59.1),
        Waiting(State.HEAD, age=0.1, left=59.9),
        Waiting(State.SENDING, age=30, left=1),
        Waiting(State.LINGER, age=30, left=3),
    ]
    loop._waiting = cast("Any", {id(each): each for each in reversed(order)})
    for count in range(1, len(order) + 1):
        assert loop._evict() == 1
        assert [each.closed for each in order] == [True] * count + [False] * (len(order) - count)
    assert loop._evict() == 0
