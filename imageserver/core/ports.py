# SPDX-License-Identifier: Apache-2.0
"""The protocols between the layers: what each asks of those below, method by method.

Offsets and lengths are bytes. Nothing here waits for a client; what waits for a back end is
bounded by the back-end timeout. One ``Backend`` serves one request, on one thread.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol, TypeVar

from imageserver.core.extents import Extent
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.slots import Deaths, Kind
from imageserver.core.sources import Body, Source
from imageserver.core.transfer import Transfer


class Intent(Enum):
    """What an image is opened for."""

    READ = auto()
    WRITE = auto()  # also zero
    REPLACE = auto()  # the whole image; the only way a missing file may be opened
    FLUSH = auto()
    EXTENTS = auto()
    DIRTY_EXTENTS = auto()  # with the image's dirty bitmap, where it has one
    INSPECT = auto()  # size and abilities, within a second


class Ticket(NamedTuple):
    """What a slot is claimed for, shown to operators."""

    transfer: str
    operation: str
    image: str
    client: str


class Backend(Protocol):
    """One open image.

    Every method may raise ``BackendError``, ``BackendTimeout`` (NBD), ``FileAccessError``
    (files), ``NoSpace`` or ``ClientGone``. After a failure only ``close`` may be called.
    """

    size: int
    #: A write that begins or ends elsewhere than at multiples of this rewrites what is around it.
    align: int

    @property
    def info(self) -> ImageInfo:
        """What the image can do. Asked before ``close``."""
        ...

    @property
    def dirty_bitmap(self) -> str | None:
        """The bitmap that dirty extents are of; None: all is dirty. Asked before ``close``."""
        ...

    @property
    def tells_holes(self) -> bool:
        """Whether extents tell of holes. Asked before ``close``."""
        ...

    @property
    def settled(self) -> bool:
        """False while a write may still be under way; asked after ``close``, too."""
        ...

    def is_unchanged(self) -> bool:
        """Tell whether what has been read is of ``info.state``; asked only if that has an ETag."""
        ...

    def read(self, start: int, length: int) -> Generator[memoryview]:
        """Yield exactly ``length`` bytes from ``start``, in pieces, in order.

        A piece is valid until the next one is asked for, the last one after ``close``, too.
        The caller guarantees ``start + length <= size``. Nothing is yielded for 0.
        """
        ...

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Generator[memoryview]:
        """Yield the bytes of spans, each (start, stop), one after the other, as ``read`` does.

        No piece has bytes of two spans. There may be many thousands, of a few KiB each.
        """
        ...

    def write(self, start: int, length: int, source: Source) -> Iterator[int]:
        """Write ``length`` bytes from ``source`` at ``start``; yield running totals acknowledged.

        The last total is ``length``: a write is done only when the back end has said so.
        Where the source fails, what is in flight is settled before the error goes on.

        Raises:
            ShortBody: the source ended early; what had arrived may be written.
        """
        ...

    def replace(self, length: int, source: Body) -> Iterator[int]:
        """Make ``length`` bytes from ``source`` the whole image; yield running totals.

        A file is replaced when the last byte is there; an export: as ``write`` from 0.
        """
        ...

    def zero(self, start: int, length: int) -> Iterator[int]:
        """Zero a range of any length; yield running totals. Unaligned edges included."""
        ...

    def flush(self) -> None:
        """Return when all that was written before is on stable storage."""
        ...

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        """Yield the extents of [start, stop), in order, merged, without gaps, in lists.

        ``dirty``: with the dirty flags of the image's bitmap, or all dirty without one. Otherwise
        that flag says *hole*, where ``tells_holes``: nothing is allocated here or in what this
        image is based on.
        """
        ...

    def stop(self) -> None:
        """Make every wait for the back end fail soon, now and later. From any thread."""
        ...

    def close(self) -> None:
        """Give everything back. Never fails, may be called twice."""
        ...


class Lock(Protocol):
    """The held lock of an image."""

    def is_settled(self, deaths: Deaths) -> bool:
        """Tell whether no write of a former holder can land any more, as far as is known."""
        ...

    def settle(self, deaths: Deaths) -> None:
        """Note that what was left before ``deaths`` has been waited for. Never fails."""
        ...

    def release(self) -> None:
        """Release the lock. Never fails, may be called twice."""
        ...


class Locks(Protocol):
    """Image locks: one holder per image over all processes of the server."""

    def acquire(self, image: Image) -> Lock:
        """Take the image's lock, or raise ``ImageBusy`` or ``StateUnavailable`` at once."""
        ...

    def acquire_briefly(self, image: Image) -> Lock:
        """Take the lock; wait for requests that hold it briefly, to share the image."""
        ...

    def settled_at(self, image: Image) -> int | None:
        """Return the count of deaths up to which this process knows it settled; None: of none."""
        ...


class Slot(Protocol):
    """A place among the readers or writers, and where the operation's progress is shown."""

    deaths: Deaths  # what was known of those who died when the place was taken

    def progress(self, done: int, expected: int) -> None:
        """Show how many bytes are done, of how many."""
        ...

    def share(self) -> None:
        """Let others share the image, which this one had alone."""
        ...

    def release(self, *, settled: bool = True) -> None:
        """Give the place back; not ``settled``: a write may be under way. Never fails."""
        ...


class Slots(Protocol):
    """How many may read and write at once, over all processes of the server."""

    def claim(
        self, kind: Kind, ticket: Ticket, *, alone: bool = False, together: bool = False
    ) -> Slot:
        """Take a slot, or raise ``NoSlot`` at once; or ``ImageBusy``, if the ticket names an image.

        ``alone``: nobody else may have the image; else none alone. ``together``: only such others.
        """
        ...


#: Raises ``ClientGone`` where nobody waits for the answer any more; called from any thread.
Check = Callable[[], None]


def no_client() -> None:
    """Check nothing: the caller wants the answer in any case."""


_Image_contra = TypeVar("_Image_contra", bound=Image, contravariant=True)


class Backends(Protocol[_Image_contra]):
    """Opens images, which call ``check`` whenever they wait long, but not to settle writes."""

    def settle(self, image: _Image_contra, check: Check = no_client) -> None:
        """Wait, within the back-end timeout, until no write of a dead holder can land any more.

        Raises:
            BackendTimeout: one still can.
        """
        ...

    def open(
        self,
        image: _Image_contra,
        intent: Intent,
        check: Check = no_client,
        transfer: Transfer | None = None,
    ) -> Backend:
        """Open an image; bounded by the connect timeout.

        ``transfer``: on whose behalf a connection may be kept afterwards, or one be used that was
        kept for it; None: a new one is made, and closed.

        Raises:
            BackendError, BackendTimeout: the NBD server refuses, or is silent.
            FileAccessError: the file cannot be opened or sized, or is none.
        """
        ...

    def drain(self) -> None:
        """Close what is kept for later requests, and keep nothing any more; does not wait."""
        ...


class Transfers(Protocol):
    """Transfers by their ids."""

    def get(self, transfer_id: str) -> Transfer:
        """Return a transfer, or raise ``UnknownImage``."""
        ...


class Owned(Enum):
    """Who wrote the file that makes a transfer known: the server or a control program."""

    REGISTERED = "registered"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class Account:
    """What has been done with a transfer."""

    bytes_read: int = 0
    bytes_written: int = 0
    last_error: str | None = None


class Activity(Protocol):
    """What all processes know of one transfer's use: how many requests, since when none.

    Any process may call any method at any time; a request whose process dies is no longer
    counted. ``close`` ends a request's use; every other method may raise ``StateUnavailable``.
    """

    changed_ns: int  # of the transfer's file, when it was used last: ``Transfer.changed_ns``

    def idle_ns(self) -> int:
        """Return how long ago ``touch`` was called last, in nanoseconds."""
        ...

    def touch(self) -> None:
        """Say that the transfer is in use now."""
        ...

    def visitors(self, for_ns: int | None = None) -> int:
        """Return how many requests, without this one, use the transfer, or do so for that long."""
        ...

    def hold(self) -> None:
        """Say, until ``close``, that a connection is kept on the transfer's behalf."""
        ...

    def is_held(self) -> bool:
        """Tell whether others keep connections on its behalf."""
        ...

    def cut(self) -> None:
        """Ask every request that has begun to end at once."""
        ...

    def is_cut(self, began_ns: int) -> bool:
        """Tell whether a request begun at ``began_ns`` (monotonic clock) is to end."""
        ...

    def add(self, done: Account, *, wait: bool) -> bool:
        """Add to the account; False if another process has it locked and ``wait`` is not set."""
        ...

    def account(self) -> Account:
        """Return what has been done with the transfer."""
        ...

    def close(self) -> None:
        """Close. Never fails, may be called twice."""
        ...


class Activities(Protocol):
    """The use of all transfers that can expire."""

    def find(self, owned: Owned, transfer_id: str, *, visit: bool) -> Activity | None:
        """Open the record of a transfer's use, None where there is none; ``visit``: to use it."""
        ...

    def make(self, owned: Owned, transfer_id: str) -> Activity:
        """Use a transfer, whose record is made where there is none."""
        ...


class Registrations(Protocol):
    """Transfers that a control program has registered."""

    def store(self, transfer: Transfer) -> None:
        """Make it known to all processes, in place of what its id stood for."""
        ...

    def remove(self, transfer_id: str) -> None:
        """Make it unknown to all processes, if it was known. Its activity remains."""
        ...

    def forget(self, transfer_id: str) -> None:
        """Drop the activity of a removed transfer, once no request uses it."""
        ...

    def count(self) -> int:
        """Return how many there are, without those that have expired."""
        ...

    def all(self) -> list[Transfer]:
        """Return them, without those that have expired, in the order of their ids."""
        ...
