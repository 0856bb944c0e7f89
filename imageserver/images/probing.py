# SPDX-License-Identifier: Apache-2.0
"""What an image can do, asked on behalf of many probes at once.

Load balancers probe in bursts. Per image one query runs at a time and the others wait for
its answer, which may then be remembered for a moment, but never beyond a change of the
image's socket. Failures are answers too: a dead server is not asked for each probe.

A server that hangs costs each query a second. Once one has been silent, nobody waits for it any
more: one query at a time finds out whether it speaks again, a few at a time over all such
images, and until then all probes are told at once what the last query has found.

Threads that must never wait (those of probes) say so: what they cannot be told at once is put
off, and asked for on a thread that may wait (``server/pools.py``).
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum, auto

from imageserver.core.errors import BackendError, BackendTimeout, Exhausted, ImageServerError
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import Backends, Intent

#: How long OPTIONS and HEAD may remember an answer, in seconds (docs/api.md).
MEMORY_SECONDS = 1.0
#: Silent images that are asked again at the same time: what a worker spends on hung servers, in
#: threads, however many there are. Half of those that may wait (``server/pools.py``).
_AGAIN = 8
#: Files that are looked at, at the same time, by threads that must not wait. Opening one takes
#: microseconds, but may take for ever where a network file system hangs.
_FILES = 4
_CAPACITY = 1024


class WouldWait(Exception):
    """The answer would have to be waited for, which this thread must not do."""


class WouldTransfer(WouldWait):
    """The answer is work for a thread that transfers."""


class Asking(Enum):
    """What may be done for an answer that is not known."""

    NOW = auto()
    """Ask the back end, or wait for the query that is under way."""
    ELSEWHERE = auto()
    """Raise ``WouldWait``: another thread may ask."""
    NEVER = auto()
    """Raise ``Exhausted``: threads that may ask had none to spare for too long."""


#: An error is kept as what to raise: an exception raised in several threads would gather all
#: their tracebacks, and keep alive what those refer to.
_Answer = ImageInfo | tuple[type[ImageServerError], str]


@dataclass(slots=True)
class _Query:
    stamp: object
    answer: Future[_Answer]
    silence: _Answer | None = None
    """What the query before this one has found, where that was silence."""
    finished: float = 0.0


class Inspector:
    """Asks images for their size and abilities; one for all requests, safe for threads."""

    def __init__(
        self,
        backends: Backends[Image],
        stamp: Callable[[Image], object] = lambda image: image.stamp(),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``stamp`` changes when the thing that an image names is another one."""
        self._backends = backends
        self._stamp = stamp
        self._now = now
        self._lock = threading.Lock()
        self._queries: OrderedDict[Image, _Query] = OrderedDict()
        self._asking_again = 0
        self._opening = 0

    def inspect(self, image: Image, max_age: float = 0.0, asking: Asking = Asking.NOW) -> ImageInfo:
        """Return what the image says, at most ``max_age`` seconds old; bounded to about 1 s.

        Raises:
            BackendError, BackendTimeout, FileAccessError: as opening it does.
            WouldWait, Exhausted: see ``Asking``.
        """
        if not image.kind.asks_server:
            return self._look_at(image, asking)
        stamp = self._stamp(image)
        with self._lock:
            query = self._queries.get(image)
            if query and query.stamp != stamp:
                query = None
            if query:
                found = self._known(query, max_age, asking)
                if found is not None:
                    return _told(found)
            _check(asking)
            ours = query is None or query.answer.done()
            if query is None or ours:
                query = self._begin(image, stamp, query)
        if ours:
            self._answer(query, image)
        return _told(query.answer.result())

    def _known(self, query: _Query, max_age: float, asking: Asking) -> _Answer | None:
        """Return what need not be asked for."""
        if not query.answer.done():
            return query.silence
        age = self._now() - query.finished
        silence = _silence(query)
        if silence:
            may_ask = asking is not Asking.NEVER and self._asking_again < _AGAIN
            return None if may_ask and age >= MEMORY_SECONDS else silence
        return query.answer.result() if age < max_age else None

    def _begin(self, image: Image, stamp: object, before: _Query | None) -> _Query:
        query = _Query(stamp, Future(), _silence(before) if before else None)
        self._asking_again += query.silence is not None
        self._queries[image] = query
        self._queries.move_to_end(image)
        if len(self._queries) > _CAPACITY:
            self._queries.popitem(last=False)
        return query

    def _answer(self, query: _Query, image: Image) -> None:
        found: _Answer = BackendError, "the query failed"
        try:
            found = self._ask(image)
        except (BackendError, Exhausted) as exc:
            found = type(exc), str(exc)
        finally:  # whatever happens, those who wait must not wait for ever
            query.finished = self._now()
            query.answer.set_result(found)
            with self._lock:
                self._asking_again -= query.silence is not None

    def _look_at(self, image: Image, asking: Asking) -> ImageInfo:
        """Return what a file says: a stat(2), with nothing to share."""
        if asking is Asking.NOW:
            return self._ask(image)
        with self._lock:
            if self._opening >= _FILES:
                _check(asking)
            self._opening += 1
        try:
            return self._ask(image)
        finally:
            with self._lock:
                self._opening -= 1

    def _ask(self, image: Image) -> ImageInfo:
        backend = self._backends.open(image, Intent.INSPECT)
        try:
            return backend.info
        finally:
            backend.close()


def _silence(query: _Query) -> _Answer | None:
    """Return what a query has found, where that is silence."""
    found = query.answer.result()
    is_silent = isinstance(found, tuple) and issubclass(found[0], BackendTimeout)
    return found if is_silent else None


def _check(asking: Asking) -> None:
    if asking is Asking.ELSEWHERE:
        raise WouldWait
    if asking is Asking.NEVER:
        raise Exhausted("no thread is free to ask the image")


def _told(found: _Answer) -> ImageInfo:
    if isinstance(found, ImageInfo):
        return found
    cls, message = found
    raise cls(message)
