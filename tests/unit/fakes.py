# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the adapters behind ``imageserver.ports``; every call goes to one journal.

``fail`` maps what would be journalled ("lock", "slot", "open", ...) to what is raised instead.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from imageserver.backends.file.kind import FileImage
from imageserver.backends.nbd.kind import NbdImage
from imageserver.core.errors import ImageBusy
from imageserver.core.extents import Extent
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import Account, Check, Intent, Owned, Ticket, no_client
from imageserver.core.slots import Deaths, Kind
from imageserver.core.sources import Source
from imageserver.core.transfer import Transfer
from imageserver.images.sessions import Sessions
from imageserver.transfers.requests import Request

DISK = NbdImage("/run/disk.sock", "vda")
TRANSFER = Transfer("t1", DISK)
DEATHS = Deaths(7, 9)
_SHARING = {"write", "zero", "flush"}
FILE_TRANSFER = Transfer("f1", FileImage("/images/disk.raw"))


def a_request(client: str = "192.0.2.1", **more: Any) -> Request:
    """Return the account of a request that has just begun."""
    return Request("GET", client, "r1", **more)


@dataclass
class World:
    """Fake locks, slots and back ends in one: what they would do, and what was asked of them."""

    content: bytearray = field(default_factory=lambda: bytearray(b"0123456789"))
    piece: int = 4
    info: ImageInfo | None = None
    abandoned: bool = False
    settled: bool = True
    fail: dict[str, BaseException] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)
    batches: list[list[Extent]] = field(default_factory=list)
    dirty_bitmap: str | None = None
    tells_holes: bool = False
    is_unchanged: Callable[[], bool] = lambda: True
    on_piece: Callable[[int], None] = lambda _: None
    on_lock: Callable[[], None] = lambda: None
    on_open: Callable[[], None] = lambda: None
    stamp: object = "first"
    settled_at: dict[Image, int] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    journal: list[str] = field(default_factory=list)
    opened: list["FakeBackend"] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    locked: list[Image] = field(default_factory=list)
    transfers: list[Transfer | None] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    metered: list[tuple[str, str, int]] = field(default_factory=list)

    @property
    def activities(self) -> "FakeActivities":
        return FakeActivities(self)

    def note(self, what: str) -> None:
        self.journal.append(what)
        if what in self.fail:
            raise self.fail[what]

    def meter(self, operation: str, backend: str) -> Callable[[int], None]:
        return lambda moved: self.metered.append((operation, backend, moved))

    def _stamp(self, image: Image) -> object:
        _key(image)
        return self.stamp

    def sessions(self, *, shares_lock: bool = False, counts_readers: bool = False) -> Sessions:
        return Sessions(
            FakeLocks(self),
            FakeSlots(self),
            FakeBackends(self),
            _key,
            shares_lock=shares_lock,
            counts_readers=counts_readers,
            meter=self,
            stamp=self._stamp,
        )


def _key(image: Image) -> str:
    """Return what all images have for an identity here; what is no image has none."""
    assert image.kind
    return "key"


class FakeLocks:
    """``ports.Locks``, and the lock itself."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._held = False

    def acquire(self, image: Image) -> "FakeLocks":
        return self._acquire("lock", image)

    def acquire_briefly(self, image: Image) -> "FakeLocks":
        return self._acquire("lock briefly", image)

    def settled_at(self, image: Image) -> int | None:
        return self._world.settled_at.get(image)

    def _acquire(self, how: str, image: Image) -> "FakeLocks":
        self._world.locked.append(image)
        self._world.note(how)
        self._world.on_lock()
        lock = FakeLocks(self._world)
        lock._held = True
        return lock

    def is_settled(self, deaths: Deaths) -> bool:
        assert deaths == DEATHS
        assert self._held
        return not self._world.abandoned

    def settle(self, deaths: Deaths) -> None:
        assert deaths == DEATHS
        assert self._held
        self._world.abandoned = False

    def release(self) -> None:
        self._held = False
        self._world.note("unlock")


class FakeSlots:
    """``ports.Slots``, and the slot itself."""

    deaths = DEATHS

    def __init__(self, world: World) -> None:
        self._world = world

    def claim(
        self, kind: Kind, ticket: Ticket, *, alone: bool = False, together: bool = False
    ) -> "FakeSlots":
        how = " alone" if alone else " together" if together else ""
        self._world.note(f"slot {kind.name}{how}")
        others = self._world.others if ticket.image else set()
        if others - _SHARING or (alone and others):
            raise ImageBusy
        self._world.tickets.append(ticket)
        return self

    def share(self) -> None:
        self._world.note("share")

    def progress(self, done: int, expected: int) -> None:
        self._world.progress.append((done, expected))

    def release(self, *, settled: bool = True) -> None:
        self._world.note("free" if settled else "free unsettled")


class FakeBackends:
    """``ports.Backends`` over the world's content."""

    def __init__(self, world: World) -> None:
        self._world = world

    def settle(self, image: Image, check: object = no_client) -> None:
        assert callable(check)
        assert check is not no_client
        self._world.images.append(image)
        self._world.note("settle")

    def open(
        self,
        image: Image,
        intent: Intent,
        check: Check = no_client,
        transfer: Transfer | None = None,
    ) -> "FakeBackend":
        self._world.images.append(image)
        self._world.transfers.append(transfer)
        self._world.note(f"open {intent.name}")
        self._world.checks.append(check)
        self._world.on_open()
        backend = FakeBackend(self._world)
        self._world.opened.append(backend)
        return backend


class FakeBackend:
    """``ports.Backend`` over a bytearray."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.size = len(world.content)
        self.align = 1
        self.closed = False

    @property
    def info(self) -> ImageInfo:
        assert not self.closed
        return self._world.info or ImageInfo(
            *(self.size, False, True, True), multi_conn=True, flushes_image=True
        )

    @property
    def dirty_bitmap(self) -> str | None:
        assert not self.closed
        return self._world.dirty_bitmap

    @property
    def tells_holes(self) -> bool:
        assert not self.closed
        return self._world.tells_holes

    @property
    def settled(self) -> bool:
        return self._world.settled

    def is_unchanged(self) -> bool:
        assert not self.closed
        return self._world.is_unchanged()

    def read(self, start: int, length: int) -> Generator[memoryview]:
        stop = start + length
        for at in range(start, stop, self._world.piece):
            self._world.on_piece(at)
            yield memoryview(bytes(self._world.content[at : min(at + self._world.piece, stop)]))

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> Generator[memoryview]:
        for start, stop in spans:
            yield from self.read(start, stop - start)

    def write(self, start: int, length: int, source: Source) -> Iterator[int]:
        done = 0
        while done < length:
            buffer = memoryview(bytearray(min(self._world.piece, length - done)))
            count = source.readinto(buffer)
            assert count
            self._world.content[start + done : start + done + count] = buffer[:count]
            done += count
            yield done

    def replace(self, length: int, source: Source) -> Iterator[int]:
        self._world.note("replace")
        yield from self.write(0, length, source)

    def zero(self, start: int, length: int) -> Iterator[int]:
        self._world.note("zero")
        self._world.content[start : start + length] = bytes(length)
        yield length

    def flush(self) -> None:
        self._world.note("flush")

    def extents(self, start: int, stop: int, *, dirty: bool) -> Generator[list[Extent]]:
        self._world.note(f"extents {start}-{stop} dirty={dirty}")
        yield from self._world.batches

    def stop(self) -> None:
        self._world.note("stop")

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self._world.note("close")


class FakeActivities:
    """``ports.Activities``, and an activity that is never idle: visits begin and end."""

    changed_ns = 0

    def __init__(self, world: World) -> None:
        self._world = world

    def find(self, _owned: Owned, _transfer_id: str, *, visit: bool) -> "FakeActivities":
        self._world.note("visit" if visit else "look")
        return self

    def idle_ns(self) -> int:
        return 0

    def touch(self) -> None: ...

    def is_cut(self, _began_ns: int) -> bool:
        return False

    def add(self, _done: Account, *, wait: bool) -> bool:
        return True

    def close(self) -> None:
        self._world.note("leave")


class Bytes:
    """``sources.Source`` over bytes that arrive ``piece`` at a time."""

    def __init__(self, data: bytes, piece: int = 3) -> None:
        self._data = data
        self._piece = piece

    def readinto(self, buffer: memoryview, _until: object = None) -> int:
        count = min(len(buffer), self._piece, len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count

    def verify(self, written: int = 0) -> None: ...
