# SPDX-License-Identifier: Apache-2.0
"""Opening exports, and an open one as the work layer sees it.

A connection serves one request at a time. Before the image is given back it is closed, or kept for
the next request where the server takes several clients (``pool.py``): one with room for one client
only must not meet an idle connection of ours.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from imageserver.backends.nbd import status, transfer, zeroing
from imageserver.backends.nbd.connection import (
    TURNED_AWAY_SECONDS,
    Attempt,
    Connection,
    Tuning,
    connect,
    no_connection,
)
from imageserver.backends.nbd.kind import NbdImage
from imageserver.backends.nbd.link import Link
from imageserver.backends.nbd.peers import has_orphans
from imageserver.backends.nbd.pool import Kept, Pool
from imageserver.backends.nbd.warmup import WarmUp
from imageserver.core import extents
from imageserver.core.errors import NO_DESCRIPTOR, BackendError, BackendTimeout
from imageserver.core.extents import Extent
from imageserver.core.kinds import ImageInfo
from imageserver.core.ports import Check, Intent, no_client
from imageserver.core.sources import Source
from imageserver.core.transfer import Transfer

CONNECT_SECONDS = 10.0
#: How long an OPTIONS or HEAD may wait for a server (docs/api.md).
INSPECT_SECONDS = 1.0
#: How often the kernel is asked whether a server still holds connections of dead clients, at last:
#: many who share an image may ask at the same time.
_SETTLE_SECONDS = 0.05


class NbdExports:
    """Opens exports; one for all requests."""

    def __init__(self, tuning: Tuning, pool: Pool) -> None:
        self._tuning = tuning
        self._pool = pool
        self._warm_up = WarmUp()

    def open(
        self,
        image: NbdImage,
        intent: Intent,
        check: Check = no_client,
        transfer: Transfer | None = None,
    ) -> "NbdExport":
        """Connect to an export, or take up a connection that was kept: see ``ports.Backends``."""
        needed = _contexts(image, intent)
        server = image.stamp() if transfer else None
        keeps = server is not None and self._pool.keeps(server)
        kept = None
        if server and transfer and keeps:
            kept = self._pool.take(server, image, needed, transfer)
        if kept is None:
            contexts = _all_contexts(image) if keeps else needed
            kept = Kept(self._connect(image, contexts, intent, check), image, transfer)
        return NbdExport(Link(kept.connection, check), image, self._warm_up, self._pool, kept)

    def _connect(
        self, image: NbdImage, contexts: Sequence[str], intent: Intent, check: Check
    ) -> Connection:
        pool = self._pool
        attempt = Attempt(
            contexts,
            INSPECT_SECONDS if intent is Intent.INSPECT else CONNECT_SECONDS,
            check,
            waits=pool.is_waited_for,
            is_turned_away=pool.is_turned_away,
            turned_away_seconds=TURNED_AWAY_SECONDS + pool.lasts_seconds,
        )
        return connect(image, attempt, self._tuning)

    def drain(self) -> None:
        """Keep no connection any more: see ``ports.Backends``."""
        self._pool.drain()

    def settle(self, image: NbdImage, check: Check = no_client) -> None:
        """Wait until the server has done with every connection whose client is dead.

        Raises:
            BackendTimeout: it has not, for the back-end timeout.
            BackendError: that cannot be told.
        """
        deadline = time.monotonic() + self._tuning.timeout
        step = 0.001
        while _has_orphans(image):
            check()
            if time.monotonic() > deadline:
                raise BackendTimeout(f"{image.socket} still holds the connection of a dead client")
            time.sleep(step)
            step = min(2 * step, _SETTLE_SECONDS)


def _has_orphans(image: NbdImage) -> bool:
    try:
        return has_orphans(image.socket, image.at)
    except OSError as exc:
        name = f"{image.socket} export {image.export!r}"
        if exc.filename is not None or exc.errno in NO_DESCRIPTOR:
            raise no_connection(name, exc) from exc
        raise BackendError(
            f"{name}: the kernel does not tell whether a dead worker's writes may still land "
            f"(sock_diag(7): {exc.strerror}); allow AF_NETLINK"
        ) from exc


def _contexts(image: NbdImage, intent: Intent) -> list[str]:
    """Return the meta contexts that an operation needs."""
    if intent is Intent.EXTENTS:
        return [extents.ALLOCATION, extents.DEPTH]
    if intent is Intent.DIRTY_EXTENTS:
        return [extents.ALLOCATION, *_bitmaps(image)]
    return []


def _all_contexts(image: NbdImage) -> list[str]:
    """Return what a connection is asked for that may serve any operation."""
    return [extents.ALLOCATION, extents.DEPTH, *_bitmaps(image)]


def _bitmaps(image: NbdImage) -> list[str]:
    return [extents.dirty_context(image.bitmap)] if image.bitmap else []


class NbdExport:
    """One request's use of one export: a ``ports.Backend``."""

    def __init__(
        self, link: Link, image: NbdImage, warm_up: WarmUp, pool: Pool, kept: Kept
    ) -> None:
        self._link = link
        self._pool = pool
        self._kept = kept
        self._is_closed = False
        self._image = image
        self._warm_up = warm_up
        self.size = link.size
        self.align = link.align

    @property
    def info(self) -> ImageInfo:
        """What the export can do, by its server or by its transfer."""
        info = self._link.info
        return replace(info, flushes_image=True) if self._image.flushes_image else info

    @property
    def dirty_bitmap(self) -> str | None:
        """The bitmap that dirty extents are of."""
        bitmap = self._image.bitmap
        return bitmap if status.other_context(self._link, bitmap, dirty=True) else None

    @property
    def tells_holes(self) -> bool:
        """Whether extents tell of holes."""
        return bool(status.other_context(self._link, None, dirty=False))

    @property
    def settled(self) -> bool:
        """False while a write may still be under way."""
        return self._link.settled

    def is_unchanged(self) -> bool:
        """Never asked: NBD tells no state of an export from another."""
        return True

    def read(self, start: int, length: int) -> Generator[memoryview]:
        """Yield ``length`` bytes from ``start``."""
        self._prepare(start, length)
        return transfer.read(self._link, start, length)

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Generator[memoryview]:
        """Yield the bytes of spans, one after the other."""
        length = sum(stop - start for start, stop in spans)
        self._prepare(spans[0][0] if spans else 0, length)
        return transfer.read_spans(self._link, spans)

    def write(self, start: int, length: int, source: Source) -> Iterator[int]:
        """Write ``length`` bytes from ``source`` at ``start``."""
        self._prepare(start, length)
        return transfer.write(self._link, start, length, source)

    def replace(self, length: int, source: Source) -> Iterator[int]:
        """Write the whole export."""
        self._prepare(0, length)
        return transfer.write(self._link, 0, length, source)

    def _prepare(self, start: int, length: int) -> None:
        self._warm_up.read_once(self._link, start, length)

    def zero(self, start: int, length: int) -> Iterator[int]:
        """Zero a range of any length."""
        return zeroing.zero(self._link, start, length, hole=self._image.sparse)

    def flush(self) -> None:
        """Bring all earlier writes to stable storage."""
        self._link.wait(self._link.flush())

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        """Yield the extents of [start, stop)."""
        return status.list_extents(self._link, self._image.bitmap, start, stop, dirty=dirty)

    def stop(self) -> None:
        """Give the server up."""
        self._link.stop()

    def close(self) -> None:
        """Leave the connection to the next request, or close it."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._link.is_clean:
            self._link.let_go()
            self._pool.give(self._kept)
        else:
            self._link.close()
            self._kept.release()
