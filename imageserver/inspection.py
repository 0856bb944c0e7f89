# SPDX-License-Identifier: Apache-2.0
"""What an image can do, asked on behalf of many probes at once.

Load balancers probe in bursts. Per image one query runs at a time and the others wait for
its answer, which may then be remembered for a moment, but never beyond a change of the
image's socket. Failures are answers too: a dead server is not asked for each probe.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from imageserver.errors import BackendError
from imageserver.ports import Backends, ImageInfo, Intent
from imageserver.transfers import FileImage, Image

#: How long OPTIONS may remember an answer, in seconds (docs/api.md).
MEMORY_SECONDS = 1.0
_CAPACITY = 1024


#: An error is kept as what to raise: an exception raised in several threads would gather all
#: their tracebacks, and keep alive what those refer to.
_Answer = ImageInfo | tuple[type[BackendError], str]


@dataclass(slots=True)
class _Query:
    stamp: object
    answer: Future[_Answer]
    finished: float = 0.0


class Inspector:
    """Asks images for their size and abilities; one for all requests, safe for threads."""

    def __init__(
        self,
        backends: Backends,
        stamp: Callable[[Image], object],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``stamp`` changes when the thing that an image names is another one."""
        self._backends = backends
        self._stamp = stamp
        self._now = now
        self._lock = threading.Lock()
        self._queries: OrderedDict[Image, _Query] = OrderedDict()

    def inspect(self, image: Image, max_age: float = 0.0) -> ImageInfo:
        """Return what the image says, at most ``max_age`` seconds old; bounded to about 1 s.

        Raises:
            BackendError, BackendTimeout, FileAccessError: as opening it does.
        """
        if isinstance(image, FileImage):
            return self._ask(image)  # a stat(2): nothing to share
        stamp = self._stamp(image)
        with self._lock:
            query = self._queries.get(image)
            ours = query is None or query.stamp != stamp or self._is_stale(query, max_age)
            if query is None or ours:
                query = self._queries[image] = _Query(stamp, Future())
                self._queries.move_to_end(image)
                if len(self._queries) > _CAPACITY:
                    self._queries.popitem(last=False)
        if ours:
            self._answer(query, image)
        found = query.answer.result()
        if isinstance(found, ImageInfo):
            return found
        cls, message = found
        raise cls(message)

    def _is_stale(self, query: _Query, max_age: float) -> bool:
        return query.answer.done() and self._now() - query.finished >= max_age

    def _answer(self, query: _Query, image: Image) -> None:
        found: _Answer = BackendError, "the query failed"
        try:
            found = self._ask(image)
        except BackendError as exc:
            found = type(exc), str(exc)
        finally:  # whatever happens, those who wait must not wait for ever
            query.finished = self._now()
            query.answer.set_result(found)

    def _ask(self, image: Image) -> ImageInfo:
        backend = self._backends.open(image, Intent.INSPECT)
        try:
            return backend.info
        finally:
            backend.close()
