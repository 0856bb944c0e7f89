# SPDX-License-Identifier: Apache-2.0
"""The threads that move pieces: one for each connection, taking what is next.

The rest of a piece whose request failed goes back to the queue, and any thread takes it. The
thread that failed waits first: where a server refuses the fourth connection, three threads do
the work. An error that is not retried stops all threads. The caller's thread moves nothing: it
reports progress, saves the state, and handles Ctrl-C.
"""

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from imageserver.client.backoff import FailureStreak, RetryBudget
from imageserver.client.failures import Transient
from imageserver.client.plan import Piece, Range, joined

#: How often the caller's thread is called back, in seconds.
TICK_SECONDS = 0.1
#: How long all threads may take to stop, in seconds: they check for it after each MiB.
_STOP_SECONDS = 5.0

#: Called by a move with the number of bytes moved; raises ``Stopped`` to end the move.
Advance = Callable[[int], None]
#: Moves a piece from its position on; advances the position behind bytes that are done.
Move = Callable[[Piece, Advance], None]


class Stopped(Exception):
    """The thread has to end; no error."""


class Movers:
    """Moves pieces with several connections; ``is_proof``: bytes that move are progress.

    Sent bytes are not: a server that is about to refuse a request takes its body, too.
    """

    def __init__(
        self, move: Move, pieces: Iterable[Piece], budget: RetryBudget, *, is_proof: bool
    ) -> None:
        self._move = move
        self._pieces = iter(pieces)
        self._budget = budget
        self._is_proof = is_proof
        self._lock = threading.Lock()
        self._back: deque[Piece] = deque()
        self._working: dict[int, Piece] = {}
        self._done: list[Range] = []
        self._stop = threading.Event()
        self._error: BaseException | None = None
        #: Bytes moved so far, by thread: each adds to its own.
        self._moved: dict[int, int] = {}

    @property
    def moved(self) -> int:
        """Bytes moved so far."""
        return sum(self._moved.copy().values())

    def done(self) -> list[Range]:
        """Return the covered ranges that were moved so far; not all of it may be synced."""
        with self._lock:
            self._done = joined(self._done)
            unfinished = [*self._working.values(), *self._back]
            return joined([*self._done, *(piece.done for piece in unfinished)])

    def run(self, connections: int, watch: Callable[[], None], cut: Callable[[], None]) -> None:
        """Move all pieces; call ``watch`` ten times a second, and ``cut`` to wake waiting threads.

        Raises:
            ClientError: the first one that is not retried, or no longer.
            KeyboardInterrupt: the threads have stopped.
        """
        threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True)
            for number in range(connections)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(TICK_SECONDS)
                    watch()
                    if self._error:
                        break
        finally:
            self._stop.set()
            if any(thread.is_alive() for thread in threads):
                cut()
            deadline = time.monotonic() + _STOP_SECONDS
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
        if self._error:
            raise self._error

    def _work(self, number: int) -> None:
        streak = FailureStreak()
        try:
            while piece := self._take(number):
                streak = self._try(number, piece, streak)
        except Stopped:
            pass
        except BaseException as exc:  # noqa: BLE001 - raised again by the caller's thread
            if not self._stop.is_set():
                self._error = exc
            self._stop.set()

    def _try(self, number: int, piece: Piece, streak: FailureStreak) -> FailureStreak:
        """Move a piece; on failure give it back and wait. Return the failures in a row."""
        before, steps = piece.position, self._budget.steps
        try:
            self._move(piece, functools.partial(self._advance, number))
        except Transient as exc:
            if self._stop.is_set():
                raise Stopped from exc
            self._give(number, piece, finished=False)
            if piece.position > before and not self._is_proof:
                self._budget.progress()  # the server has said that it has so much
            if piece.position > before and self._budget.steps > steps:
                streak = FailureStreak()
            self._stop.wait(self._budget.after(streak, exc))
            return streak
        self._give(number, piece, finished=True)
        self._budget.progress()
        return FailureStreak()

    def _advance(self, number: int, count: int) -> None:
        self._moved[number] = self._moved.get(number, 0) + count
        if self._is_proof:
            self._budget.moved(count)
        if self._stop.is_set():
            raise Stopped

    def _take(self, number: int) -> Piece | None:
        if self._stop.is_set():
            raise Stopped
        with self._lock:
            piece = self._back.popleft() if self._back else next(self._pieces, None)
            if piece is not None:
                self._working[number] = piece
            return piece

    def _give(self, number: int, piece: Piece, *, finished: bool) -> None:
        with self._lock:
            del self._working[number]
            if finished:
                self._done.append((piece.cover, piece.stop))
                if len(self._done) > 1000:  # noqa: PLR2004 - joined seldom, never long
                    self._done = joined(self._done)
            else:
                self._back.append(piece)
