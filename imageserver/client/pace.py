# SPDX-License-Identifier: Apache-2.0
"""The least rate at which an answer must come.

    socket's timeout    bounds the time without any byte
    Pace                bounds the rate: in each period as long as that timeout, ``LEAST_RATE`` on
                        average must have come, or the answer is broken

So a server that sends one byte now and then cannot hold a command for ever.
"""

import io
import math
import time
from collections.abc import Callable
from typing import IO, Any

#: Least average rate of an answer, head included, in bytes per second.
LEAST_RATE = 1024
#: Bytes from a server that is still working: blanks, maybe as chunks with their lengths in hex.
_AT_WORK = b" \t\r\n0123456789abcdefABCDEF"
#: How long they count as progress, in seconds, for a list of extents.
LONGEST_WORK = 3600.0


class Slow(OSError):
    """An answer comes too slowly."""


class Pace:
    """How fast an answer comes, counted from its first byte."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """``seconds``: length of a period; None: no least rate."""
        self._seconds = math.inf if seconds is None else seconds
        self._clock = clock
        self._began: float | None = None
        self._since, self._count = 0.0, 0
        #: How long blanks count as progress, in seconds.
        self.blanks_seconds = 0.0

    def came(self, data: "bytes | memoryview") -> None:
        """Count bytes that came.

        Raises:
            Slow: too few came in this period.
        """
        now = self._clock()
        if self._began is None:
            self._began = self._since = now
        if self._is_at_work(data, now - self._began):
            self._since, self._count = now, 0
            return
        self._count += len(data)
        passed = now - self._since
        if passed < self._seconds:
            return
        if self._count < LEAST_RATE * passed:
            raise Slow(f"less than {LEAST_RATE} bytes per second came for {passed:.0f} s")
        self._since, self._count = now, 0

    def _is_at_work(self, data: bytes | memoryview, since_first: float) -> bool:
        return since_first < self.blanks_seconds and not bytes(data[:64]).strip(_AT_WORK)


class _Paced(io.RawIOBase):
    """The stream of a socket; a ``Pace`` counts what is read."""

    def __init__(self, raw: Any, pace: Pace) -> None:  # noqa: ANN401 - a SocketIO
        self._raw, self._pace = raw, pace

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - any buffer
        count: int | None = self._raw.readinto(buffer)
        if count:
            self._pace.came(memoryview(buffer)[:count])
        return count

    def fileno(self) -> int:
        number: int = self._raw.fileno()
        return number

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def paced(stream: IO[bytes], pace: Pace) -> io.BufferedReader:
    """Return a reader that replaces ``stream``, from which nothing may have been read."""
    assert isinstance(stream, io.BufferedReader)  # noqa: S101 - what socket.makefile returns
    return io.BufferedReader(_Paced(stream.detach(), pace))
