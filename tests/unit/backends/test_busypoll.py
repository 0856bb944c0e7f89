# SPDX-License-Identifier: Apache-2.0
"""When a thread looks for its answer without sleeping, by a clock that is set."""

import os
import time
from dataclasses import dataclass, field

import nbd
import pytest

from imageserver.backends.nbd import busypoll
from imageserver.backends.nbd.busypoll import BusyPoll

LOOK = 2e-6
WAKE_UP = 5e-5
MILLISECONDS = 100


@dataclass
class Server:
    """Answers a wait after so many seconds of its own clock; what it was asked, by timeout."""

    answers_in: float = 0.0
    clock: float = 1000.0
    yields: int = 0
    asked: list[int] = field(default_factory=list)

    def wait(self, how: BusyPoll) -> list[int]:
        """Return the timeouts of the polls that a wait takes."""
        self.asked = []
        due = self.clock + self.answers_in

        def poll(milliseconds: int) -> int:
            self.asked.append(milliseconds)
            if milliseconds:
                self.clock = max(self.clock, due) + WAKE_UP
                return 1
            self.clock += LOOK
            return int(self.clock >= due)

        how.wait(poll, MILLISECONDS)
        return self.asked

    def yield_core(self) -> None:
        self.yields += 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(time, "monotonic", lambda: made.clock)
    monkeypatch.setattr(os, "sched_yield", made.yield_core)
    return made


def test_a_quick_answer_is_found_without_sleeping(server: Server) -> None:
    server.answers_in = 1e-4
    asked = server.wait(BusyPoll())
    assert set(asked) == {0}
    assert server.yields == len(asked) - 1  # the core is offered to others after each look


def test_a_wait_that_takes_longer_sleeps_in_the_end(server: Server) -> None:
    server.answers_in = 0.01
    asked = server.wait(BusyPoll())
    assert asked[-1] == MILLISECONDS
    assert asked.count(0) * LOOK == pytest.approx(busypoll._SPIN_SECONDS, rel=0.05)


def test_a_slow_server_is_soon_waited_for_asleep(server: Server) -> None:
    how = BusyPoll()
    server.answers_in = 0.01
    waits = [server.wait(how) for _ in range(5)]
    assert waits[-1] == [MILLISECONDS]


def test_a_server_that_is_quick_again_is_looked_at_again(server: Server) -> None:
    how = BusyPoll()
    server.answers_in = 1.0
    for _ in range(50):
        server.wait(how)
    server.answers_in = 1e-5
    waits = [server.wait(how) for _ in range(20)]
    assert waits[0] == [MILLISECONDS]
    assert set(waits[-1]) == {0}


@pytest.mark.usefixtures("server")
def test_a_connection_that_breaks_ends_the_wait() -> None:
    def breaks(_milliseconds: int) -> int:
        raise nbd.Error("reset", 104)

    with pytest.raises(nbd.Error):
        BusyPoll().wait(breaks, MILLISECONDS)
