# SPDX-License-Identifier: Apache-2.0
"""Threads that move pieces: failures, budget, and the end."""

import threading
import time

import pytest

from imageserver.client.backoff import RetryBudget
from imageserver.client.failures import Broken, Busy, Refused
from imageserver.client.moving.movers import Movers
from imageserver.client.plan import Piece, Spans, pieces


def nothing() -> None:
    pass


def todo():
    return pieces(Spans([(0, 100)]), 10)


def test_a_piece_that_failed_goes_on_where_it_stopped():
    seen, lock = [], threading.Lock()

    def move(piece, advance):
        with lock:
            seen.append((piece.position, piece.stop))
        half = piece.start + 5
        if piece.position < half:
            advance(half - piece.position)
            piece.position = half
            raise Busy("half of it")
        advance(piece.stop - half)
        piece.position = piece.stop

    movers = Movers(move, todo(), RetryBudget(60), is_proof=True)
    movers.run(3, nothing, nothing)
    assert movers.moved == 100
    assert movers.done() == [(0, 100)]
    assert sorted(seen) == sorted(
        (start, end // 10 * 10) for end in range(10, 110, 10) for start in (end - 10, end - 5)
    )


def test_one_that_is_refused_leaves_the_work_to_others():
    def move(piece, advance):
        if threading.current_thread() is not first:
            raise Busy("one reader only")
        advance(10)

    started = []

    def first_only(piece, advance):
        nonlocal first
        if not started:
            started.append(1)
            first = threading.current_thread()
        move(piece, advance)

    first = None
    movers = Movers(first_only, todo(), RetryBudget(60), is_proof=True)
    movers.run(4, nothing, nothing)
    assert (movers.moved, movers.done()) == (100, [(0, 100)])


def test_what_was_acknowledged_renews_the_patience_of_an_upload():
    """Of an upload bytes that move say nothing; a position that has moved does."""

    def move(piece, advance):
        time.sleep(0.05)
        piece.position += 1
        if piece.position < piece.stop:
            raise Broken("cut")

    movers = Movers(move, iter([Piece(0, 0, 10)]), RetryBudget(0.2), is_proof=False)
    movers.run(1, nothing, nothing)
    assert movers.done() == [(0, 10)]


def test_the_first_error_stops_all():
    def move(piece, advance):
        if piece.start == 30:
            raise Refused("no")
        advance(10)

    movers = Movers(move, todo(), RetryBudget(60), is_proof=True)
    with pytest.raises(Refused, match="no"):
        movers.run(1, nothing, nothing)
    assert movers.done() == [(0, 30)]


def test_an_interruption_ends_those_that_wait():
    waiting, cut = threading.Event(), threading.Event()

    def move(piece, advance):
        waiting.set()
        assert cut.wait(10)
        raise Busy("cut")

    def watch():
        assert waiting.wait(10)
        raise KeyboardInterrupt

    movers = Movers(move, todo(), RetryBudget(60), is_proof=True)
    with pytest.raises(KeyboardInterrupt):
        movers.run(1, watch, cut.set)
    assert movers.done() == []
