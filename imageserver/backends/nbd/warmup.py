# SPDX-License-Identifier: Apache-2.0
"""One large read of each server that is new, for the sake of its memory allocator.

qemu-nbd allocates a buffer for each request. glibc takes one that is above its mmap threshold
from the kernel, whose pages come one fault at a time, and raises the threshold when such a
block is freed (mallopt(3), M_MMAP_THRESHOLD). So one request that is larger than all others
lets those come from the heap: of a GET of 1 MiB, qemu-nbd needs 0.4 ms of CPU then, not 0.9.
"""

from imageserver.backends.nbd.failures import Stopped
from imageserver.backends.nbd.link import Link
from imageserver.core.errors import BackendTimeout, ClientGone, ImageServerError

#: How much larger than the others, in requests: what slow storage hardly notices.
_CHUNKS = 2
#: Requests below glibc's first threshold, in bytes, never meet it.
_SMALL = 128 << 10
#: More servers than one worker has to do with before it is replaced.
_MOST = 1024


class WarmUp:
    """Reads once from each server: the one behind a socket, as that was bound."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()

    def read_once(self, link: Link, start: int, length: int) -> None:
        """Read once, near ``start``, if the server is new.

        A read that fails says nothing about what the client wants.

        Raises:
            BackendTimeout: the server completed nothing for the timeout.
            ClientGone, Stopped: nobody waits for the answer any more.
        """
        size = min(_CHUNKS * link.chunk, link.maximum, link.size) // link.align * link.align
        if length <= _SMALL or size <= link.chunk or link.server in self._seen:
            return
        if len(self._seen) >= _MOST:
            self._seen.clear()
        self._seen.add(link.server)
        first = min(start, link.size - size) // link.align * link.align
        try:
            link.wait(link.pread(memoryview(bytearray(size)), first))
        except (BackendTimeout, ClientGone, Stopped):
            raise
        except ImageServerError:
            pass
