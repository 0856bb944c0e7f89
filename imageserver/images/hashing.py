# SPDX-License-Identifier: Apache-2.0
"""A body that is hashed while it is written, and compared with what its client announced.

    client --readinto--> buffer --> image
                            |
                            '-----> hash      on a thread of its own, for a long body

The hash reads the very buffers that are written from. One is not filled anew before what lay in
it has been hashed, and when the body has come to its end, so has the hash.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

from imageserver.core.digests import Expected
from imageserver.core.errors import DigestMismatch
from imageserver.core.sources import HasFileno, Source

#: From this length on, in bytes, a body is hashed beside the I/O. A thread costs as much as the
#: hash of some 100 KiB, and gains little before the first MiB.
LONG = 4 << 20


class Hashed:
    """What comes from ``source``, ``length`` bytes of it: a ``sources.Body``. Close it."""

    def __init__(self, source: Source, length: int, expected: Sequence[Expected]) -> None:
        self._source = source
        self._expected = expected
        self._left = length
        self._hashes = {
            each.algorithm: hashlib.new(each.algorithm.replace("-", "")) for each in expected
        }
        hashes = tuple(self._hashes.values())
        self._hasher: _Here | _Beside = _beside(hashes) if length >= LONG else _Here(hashes)
        #: Where a call goes on with what the one before it has begun to fill.
        self._memory: object = None
        self._rest = 0

    def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        """Fill ``buffer``, and have it hashed: see ``sources.Source``."""
        memory = buffer.obj
        if memory is not self._memory or len(buffer) != self._rest:
            self._hasher.free(memory)
        count = self._source.readinto(buffer, until)
        self._memory, self._rest = memory, len(buffer) - count
        if count:
            self._left -= count
            self._hasher.add(buffer[:count])
            if not self._left:
                self._hasher.finish()
        return count

    def verify(self, written: int = 0) -> None:
        """Compare: see ``sources.Body``."""
        for each in self._expected:
            if self._hashes[each.algorithm].digest() != each.digest:
                raise DigestMismatch(each.header, written)

    def close(self) -> None:
        """Stop hashing, wherever the body has come to. May be called twice."""
        self._hasher.close()


class _Here:
    """Hashes at once."""

    def __init__(self, hashes: Sequence["hashlib._Hash"]) -> None:
        self._hashes = hashes

    def free(self, memory: object) -> None:
        """Return: nothing waits."""

    def add(self, data: memoryview) -> None:
        for each in self._hashes:
            each.update(data)

    def finish(self) -> None:
        """Return: nothing waits."""

    def close(self) -> None:
        """Return: nothing runs."""


class _Beside(threading.Thread):
    """Hashes on a thread, in order."""

    def __init__(self, hashes: Sequence["hashlib._Hash"]) -> None:
        super().__init__(name="hash", daemon=True)
        self._hashes = hashes
        self._changed = threading.Condition(threading.Lock())
        #: What is to be hashed, its first being hashed now.
        self._todo: deque[memoryview] = deque()
        self._is_ended = False

    def run(self) -> None:
        """Hash what comes, until ``close``."""
        try:
            while (data := self._next()) is not None:
                for each in self._hashes:
                    each.update(data)
                with self._changed:
                    self._todo.popleft()
                    self._changed.notify_all()
        finally:
            self._end()  # whatever happens here, nobody waits for it

    def _next(self) -> memoryview | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._todo) or self._is_ended)
            return None if self._is_ended else self._todo[0]

    def free(self, memory: object) -> None:
        """Wait until nothing of this memory is to be hashed any more."""
        self._wait_for(lambda: all(data.obj is not memory for data in self._todo))

    def add(self, data: memoryview) -> None:
        """Have something hashed."""
        with self._changed:
            self._todo.append(data)
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is hashed."""
        self._wait_for(lambda: not self._todo)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._is_ended)

    def close(self) -> None:
        """End the thread."""
        self._end()
        self.join()

    def _end(self) -> None:
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()


def _beside(hashes: Sequence["hashlib._Hash"]) -> _Here | _Beside:
    """Return what hashes on a thread; where the system has none, here."""
    beside = _Beside(hashes)
    try:
        beside.start()
    except RuntimeError:
        return _Here(hashes)
    return beside
