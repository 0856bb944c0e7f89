# SPDX-License-Identifier: Apache-2.0
"""The checksum of an image, computed by several threads, over several links where that is allowed.

    request's thread    walks the extents, hands data blocks out, adds the parts up in order
    worker 0            reads over the session's own back end, in turns with the walk
    others              over a link of their own each; where the image has no multi-conn, or its
                        server no room, in turns over the same one: then only hashing is parallel

A bounded number of blocks is under way, so memory does not depend on the image.
"""

import os
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, closing, nullcontext
from queue import SimpleQueue
from typing import Self

from imageserver.core.checksums import Block, Recipe
from imageserver.core.errors import ClientGone, Exhausted, ImageServerError
from imageserver.core.extents import Extent
from imageserver.core.ports import Backend
from imageserver.core.ranges import Span
from imageserver.images.sessions import Session

#: How many threads read and hash.
_WORKERS = max(2, min(4, os.cpu_count() or 1))
#: How many entries, blocks of data or runs of zero blocks, are under way.
_AHEAD = 2 * _WORKERS
#: How soon it is noticed that the client has gone.
_CHECK_SECONDS = 0.1

_Task = tuple[Block, Future[bytes]]


def checksum(session: Session, span: Span, recipe: Recipe) -> Generator[bool]:
    """Compute the checksum of ``span``; yield False now and then, and True once it is there.

    The session is closed before.
    """
    session.request.begin(span)
    with session, _Crew(session, recipe) as crew:
        for done in crew.blocks(span):
            if done:
                session.request.progress(done - span.start)
            yield False
    yield True


def _listed(session: Session, span: Span, *, has_extents: bool) -> Generator[list[Extent]]:
    """Yield extents; all is data where the kind of image has none."""
    if has_extents:
        yield from session.backend.extents(span.start, span.stop, dirty=False)
    elif span.length:
        yield [(span.start, span.length, False, False)]


class _Crew:
    """The threads of one checksum; its ``with`` block ends when all of them have ended."""

    def __init__(self, session: Session, recipe: Recipe) -> None:
        self._session, self._recipe = session, recipe
        self._request = session.request
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._links: list[Backend] = []
        #: Whose turn it is at the session's own back end.
        self._turn = threading.Lock()
        self._is_over = False
        self._has_many = session.info.multi_conn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _cls: object, exc: BaseException | None, _traceback: object) -> None:
        if exc is not None:
            self._is_over = True
            for backend in (self._session.backend, *self._links):
                backend.stop()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def blocks(self, span: Span) -> Generator[int]:
        """Add all blocks of a span; yield how far that is now and then, 0 where nothing is new."""
        splitter = self._recipe.splitter(span.start)
        pending: deque[tuple[Block, Future[bytes] | None]] = deque()
        listed = _listed(self._session, span, has_extents=self._session.has_extents)
        with closing(listed):
            while (batch := (yield from self._next(listed))) is not None:
                for block in splitter.add(batch):
                    pending.append((block, self._hand_out(block)))
                    if len(pending) >= _AHEAD:
                        yield from self._add(*pending.popleft())
                yield 0
        pending.extend((block, self._hand_out(block)) for block in splitter.finish())
        while pending:
            yield from self._add(*pending.popleft())

    def _next(self, listed: Generator[list[Extent]]) -> Generator[int, None, list[Extent] | None]:
        while not self._turn.acquire(timeout=_CHECK_SECONDS):
            self._request.check()
            yield 0
        try:
            return next(listed, None)
        finally:
            self._turn.release()

    def _hand_out(self, block: Block) -> Future[bytes] | None:
        if not block.data:
            return None
        future: Future[bytes] = Future()
        self._tasks.put((block, future))
        if len(self._threads) < _WORKERS:
            self._start()
        return future

    def _start(self) -> None:
        work = self._work_here if not self._threads else self._work_elsewhere
        thread = threading.Thread(target=work, name="checksum", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            if not self._threads:
                raise Exhausted(str(exc)) from exc
        else:
            self._threads.append(thread)

    def _add(self, block: Block, future: Future[bytes] | None) -> Generator[int]:
        if future is None:
            self._recipe.add_zeros(block.length)
            self._request.check()
        else:
            while not wait((future,), _CHECK_SECONDS).done:
                self._request.check()
                yield 0
            self._recipe.add(future.result())
        yield block.start + block.length

    # In threads

    def _work_here(self) -> None:
        self._work(self._session.backend, self._turn, in_turns=not self._has_many)

    def _work_elsewhere(self) -> None:
        if not self._has_many:
            self._work_here()
            return
        try:
            link = self._session.open_link(self._check)
        except (ImageServerError, ClientGone):
            return  # the server has no room for more: those who have a link do the work
        self._links.append(link)
        self._work(link, nullcontext(), in_turns=False)

    def _check(self) -> None:
        if self._is_over:
            raise ClientGone
        self._request.check()

    def _work(
        self, backend: Backend, turn: AbstractContextManager[object], *, in_turns: bool
    ) -> None:
        """Do tasks to the end; ``in_turns``: others want the back end while this one hashes."""
        while (task := self._tasks.get()) is not None:
            block, future = task
            if self._is_over:
                return
            try:
                future.set_result(self._part(block, backend, turn, in_turns=in_turns))
            except BaseException as exc:  # noqa: BLE001 - raised again by the request's thread
                future.set_exception(exc)

    def _part(
        self,
        block: Block,
        backend: Backend,
        turn: AbstractContextManager[object],
        *,
        in_turns: bool,
    ) -> bytes:
        if not in_turns:
            with turn:
                return self._recipe.part(block, backend.read)
        with turn:
            read = {
                start: [bytes(piece) for piece in backend.read(start, stop - start)]
                for start, stop in block.data
            }

        def kept(start: int, _length: int) -> Generator[memoryview]:
            yield from (memoryview(piece) for piece in read.pop(start))

        return self._recipe.part(block, kept)
