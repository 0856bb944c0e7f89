# SPDX-License-Identifier: Apache-2.0
"""The table of transitions: drawn as it is, and nothing beside it is possible."""

import re
import socket
from itertools import pairwise, product

import pytest

from imageserver.server import states
from imageserver.server.connection import Connection
from imageserver.server.states import TRANSITIONS, IllegalTransition, State

Edge = tuple[State, State]
EDGES: set[Edge] = {(old, new) for old, followers in TRANSITIONS.items() for new in followers}


def _name(edge: Edge) -> str:
    return f"{edge[0].name}-{edge[1].name}"


@pytest.mark.parametrize(
    "edge", [edge for edge in product(State, State) if edge not in EDGES], ids=_name
)
def test_no_other_transition_is_possible(edge: Edge) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        conn = Connection(ours, "unix", "name")
        conn._state = edge[0]
        with pytest.raises(IllegalTransition, match=f"^{edge[0].name} to {edge[1].name}$"):
            conn.move(edge[1])
        assert conn.state is edge[0]


def test_a_connection_may_be_closed_twice() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        conn = Connection(ours, "unix", "name")
        conn.move(State.HEAD)
        conn.close()
        conn.close()
        assert (conn.state, ours.fileno()) == (State.CLOSED, -1)


def test_the_drawing_shows_the_table() -> None:
    drawn: set[Edge] = set()
    for line in (states.__doc__ or "").splitlines():
        if not re.match(r"    [A-Z]", line):
            continue
        stations = [
            [State[name] for name in station.split(", ")]
            for station in re.split(r" --[^>]+--> ", line.strip())
        ]
        for olds, news in pairwise(stations):
            drawn.update(product(olds, news))
    assert drawn == EDGES
