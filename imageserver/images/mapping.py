# SPDX-License-Identifier: Apache-2.0
"""The map of an image for a person who looks at it, and who never stands in a writer's way.

It takes no lock and no slot, so nobody is refused for its sake: what it shows may be changing. It
asks over a connection of its own, never one that was kept, and only as long as nobody needs it:

    it is connected within half a second    else the server has no room, and the queue is left
    the server takes several clients, or    else it ends within a tenth of a second: it might
    nobody has begun with the image since   have room for one client only
    all takes two seconds                   an image of very many extents is not worth more

One map at a time in a process.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from imageserver.core.cells import Canvas
from imageserver.core.entry import fields
from imageserver.core.errors import ClientGone, ImageServerError
from imageserver.core.kinds import Image
from imageserver.core.ports import Backends, Intent
from imageserver.core.recent import CELLS
from imageserver.core.transfer import Transfer

log = logging.getLogger(__name__)

CONNECT_SECONDS = 0.5
MAP_SECONDS = 2.0


class NoMap(Exception):
    """There is none now; ``str()`` says why, without its full stop, and names no path."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image in cells; ``flag``: what they tell beside zeros, ``dirty`` or ``hole``, or ""."""

    canvas: Canvas
    flag: str


class Mapper:
    """Draws maps; one for all requests."""

    def __init__(
        self,
        backends: Backends[Image],
        users: Callable[[Image, str], Collection[object]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``users`` returns who uses an image, or a transfer of this id, now."""
        self._backends = backends
        self._users = users
        self._now = now
        self._one = threading.Lock()

    def picture(self, transfer: Transfer) -> Picture:
        """Draw a transfer's image.

        Raises:
            NoMap: it has none, or not now.
        """
        image = transfer.image
        if image.kind.extents_refusal:
            raise NoMap("images of this kind have no map")
        if not self._one.acquire(blocking=False):
            raise NoMap("another map is being drawn")
        try:
            return self._draw(image.pinned(), transfer.id)
        except ClientGone as exc:
            raise NoMap("the image's server has no room, or no time, for a look at it") from exc
        except ImageServerError as exc:
            log.info("no map: %s", exc, extra=fields(transfer=transfer.id))
            raise NoMap("the image cannot be asked now; the log says why") from exc
        finally:
            self._one.release()

    def _draw(self, image: Image, transfer: str) -> Picture:
        look = _Look(partial(self._users, image, transfer), self._now)
        has_bitmap = bool(image.fields().get("export_bitmap"))
        intent = Intent.DIRTY_EXTENTS if has_bitmap else Intent.EXTENTS
        with closing(self._backends.open(image, intent, look.check)) as backend:
            look.seconds, look.gives_way = MAP_SECONDS, not backend.info.multi_conn
            dirty = has_bitmap and backend.dirty_bitmap is not None
            canvas = Canvas(backend.size, CELLS)
            for batch in backend.extents(0, backend.size, dirty=dirty) if backend.size else ():
                look.check()
                for start, length, zero, flag in batch:
                    canvas.add(start, length, zero=zero, dirty=flag)
            told = "dirty" if dirty else "hole" if backend.tells_holes else ""
        return Picture(canvas, told)


class _Look:
    """How long a look at an image may go on."""

    def __init__(self, users: Callable[[], Collection[object]], now: Callable[[], float]) -> None:
        self._users, self._now = users, now
        self._began, self._before = now(), set(users())
        self.seconds = CONNECT_SECONDS
        self.gives_way = True

    def check(self) -> None:
        """Raise ``ClientGone`` where it must end."""
        if self._now() - self._began > self.seconds:
            raise ClientGone
        if self.gives_way and set(self._users()) - self._before:
            raise ClientGone
