# SPDX-License-Identifier: Apache-2.0
"""One request's right to one image: lock, then slot, then open back end; given back in reverse.

    operation           lock        slot
    read                -           READ
    write, zero, PUT    exclusive   WRITE
    flush, extents      exclusive   OTHER (shown, not limited)

With more than one writer, range writes, zero and flush of one export share its lock: each
takes it only until its slot, which names the image, is claimed. Whoever wants the image alone
takes the lock and finds no such slot.

Only an export with multi-conn is shared, and that is known once it is open:

1. The last server at the image's socket lacked it, or nobody may share: the image is taken alone.
2. Otherwise it is shared and opened. With multi-conn, the operation begins.
3. Without, everything is given back before a byte is written, and the image taken alone. Of
   several that meet there, the last to give back finds nobody, so that one of them gets it.

Who has it alone and finds multi-conn (another server has come) lets others in.

A streamed answer outlives the code that began it, so the right belongs to an object. Who
opens a ``Session`` sees to its ``close()``, which is idempotent and gives all three back.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from imageserver.core.errors import ClientGone, ImageBusy
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import (
    Backend,
    Backends,
    Check,
    Intent,
    Lock,
    Locks,
    Meter,
    Slot,
    Slots,
    Ticket,
)
from imageserver.core.ranges import Span
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer
from imageserver.transfers.visits import UNTRACKED, Visit


@dataclass(frozen=True, slots=True)
class Need:
    """What an operation needs before it may touch an image."""

    operation: str
    intent: Intent
    locked: bool
    kind: Kind
    shares: bool = False
    """Several may have the image at once, where more than one writer is allowed (docs/api.md)."""


READ = Need("read", Intent.READ, locked=False, kind=Kind.READ)
WRITE = Need("write", Intent.WRITE, locked=True, kind=Kind.WRITE, shares=True)
REPLACE = Need("replace", Intent.REPLACE, locked=True, kind=Kind.WRITE)
ZERO = Need("zero", Intent.WRITE, locked=True, kind=Kind.WRITE, shares=True)
FLUSH = Need("flush", Intent.FLUSH, locked=True, kind=Kind.OTHER, shares=True)
EXTENTS = Need("extents", Intent.EXTENTS, locked=True, kind=Kind.OTHER)
DIRTY_EXTENTS = Need("extents", Intent.DIRTY_EXTENTS, locked=True, kind=Kind.OTHER)


#: More exports without multi-conn than one worker has to do with before it is replaced.
_MOST_SINGLE = 1024

_UNSEEN = object()

_SHARING = frozenset(need.operation for need in (WRITE, ZERO, FLUSH))


def _unmetered(_count: int) -> None:
    pass


class Session:
    """An open image and the right to use it. Close it; closing twice is harmless."""

    def __init__(
        self, backend: Backend, slot: Slot, held: ExitStack, visit: Visit, kind: Kind
    ) -> None:
        self.backend = backend
        self.size = backend.size
        #: Others may write to the image at the same time, elsewhere in it.
        self.shared = False
        #: What of the image the operation is about, and how many bytes of that are done.
        self.span: Span | None = None
        self.done = 0
        #: Told of bytes as they move.
        self.moved: Callable[[int], None] = _unmetered
        self._slot = slot
        self._visit = visit
        self._kind = kind
        self._held = held

    @property
    def info(self) -> ImageInfo:
        """What the image can do."""
        return self.backend.info

    def begin(self, span: Span) -> None:
        """Say what of the image the operation is about."""
        self.span = span
        self._slot.progress(0, span.length)

    def progress(self, done: int) -> None:
        """Show operators how far the operation has come, in bytes of its span."""
        self.moved(done - self.done)
        self.done = done
        self._slot.progress(done, self.span.length if self.span else 0)
        self._visit.progress(self._kind, done)

    def close(self) -> None:
        """Give everything back: the back end first, the lock last."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _cls: object, exc: BaseException | None, _traceback: object) -> None:
        if exc:
            self._visit.failed(exc)
        self.close()


class Sessions:
    """Opens sessions; one for all requests."""

    def __init__(  # noqa: PLR0913 - its collaborators
        self,
        locks: Locks,
        slots: Slots,
        backends: Backends[Image],
        key: Callable[[Image], str],
        *,
        shares_lock: bool = False,
        stamp: Callable[[Image], object] = lambda image: image.stamp(),
        meter: Meter | None = None,
    ) -> None:
        """``shares_lock``: range writes, zero and flush of one export may run side by side.

        ``stamp`` changes when the server that an image names is another one.
        """
        self._shares_lock = shares_lock
        self._meter = meter
        self._locks = locks
        self._slots = slots
        self._backends = backends
        self._key = key
        self._stamp = stamp
        #: Images whose servers, by their stamps, lack multi-conn.
        self._single: dict[Image, object] = {}

    def open(
        self,
        transfer: Transfer,
        need: Need,
        client: str,
        visit: Visit = UNTRACKED,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> Session:
        """Take what ``need`` says, in order, without waiting for a request that lives.

        The visit ends with the session. ``is_gone`` tells whether the client has.

        Raises:
            ImageBusy: the image's lock is held.
            NoSlot: all slots of the kind are taken.
            StateUnavailable: locks or slots cannot be used now.
            BackendError, BackendTimeout, FileAccessError: the image cannot be opened.
            ClientGone: nobody waits for it any more.
        """
        image = self._key(transfer.image) if need.locked else ""
        ticket = Ticket(transfer.id, need.operation, image, client)

        def check() -> None:
            if is_gone() or not visit.is_wanted():
                raise ClientGone

        request = _Request(transfer.image, need, ticket, visit, check)
        with ExitStack() as held:
            held.callback(visit.close)
            backend, slot, shared = self._take_or_share(held, request)
            session = Session(backend, slot, held.pop_all(), visit, need.kind)
            session.shared = shared
            if self._meter:
                session.moved = self._meter.meter(need.operation, transfer.image.kind.name)
            return session
        raise AssertionError  # an ExitStack swallows nothing

    def _take_or_share(self, held: ExitStack, request: "_Request") -> tuple[Backend, Slot, bool]:
        """Take what the session holds; True: others may write to the image at the same time."""
        image = request.image
        if not (request.need.shares and self._shares_lock and image.kind.shares_writers):
            backend, slot, _ = self._take(held, request)
            return backend, slot, False
        is_new = not self._is_single(image)
        if is_new:
            with ExitStack() as tried:
                backend, slot, _ = self._take(tried, request, shared=True)
                if backend.info.multi_conn:
                    held.push(tried.pop_all())
                    return backend, slot, True
            self._remember_single(image)
        backend, slot, grip = self._take(held, request, brief=is_new)
        shared = backend.info.multi_conn
        if shared:
            self._single.pop(image, None)
            grip.share()
        return backend, slot, shared

    def _is_single(self, image: Image) -> bool:
        return self._single.get(image, _UNSEEN) == self._stamp(image)

    def _remember_single(self, image: Image) -> None:
        if len(self._single) >= _MOST_SINGLE:
            self._single.clear()
        self._single[image] = self._stamp(image)

    def _take(
        self, held: ExitStack, request: "_Request", *, shared: bool = False, brief: bool = False
    ) -> "tuple[Backend, Slot, _Grip]":
        image, need = request.image, request.need
        grip = _Grip()
        if need.locked:
            grip.lock = self._lock(image, request.ticket.image, shared=shared, brief=brief)
            held.callback(grip.release)
        slot = self._slots.claim(need.kind, request.ticket)
        held.callback(slot.release)
        if grip.lock and not grip.lock.is_in_place():
            # Who comes from now on sees the slot; who came before that may have a new lock.
            raise ImageBusy
        held.push(_telling(request.visit))
        if grip.lock and grip.lock.abandoned:
            self._backends.settle(image, request.check)
            grip.lock.abandoned = False
        if shared:
            grip.share()
        backend = grip.backend = self._backends.open(image, need.intent, request.check)
        held.callback(backend.close)
        request.visit.uses(backend)
        return backend, slot, grip

    def _lock(self, image: Image, key: str, *, shared: bool, brief: bool) -> Lock:
        """Take the image's lock; those who share it have it only until their slot shows them.

        ``brief``: also wait for others who have it for as long as that.
        """
        if shared and self._slots.operations_on(key) - _SHARING:
            raise ImageBusy
        if shared or brief:
            lock = self._locks.acquire_briefly(image, shared=shared)
        else:
            lock = self._locks.acquire(image)
        with ExitStack() as held:
            held.callback(lock.release, settled=False)
            others = self._slots.operations_on(key)
            if others - _SHARING if shared else others:
                raise ImageBusy
            held.pop_all()
        return lock


@dataclass(frozen=True, slots=True)
class _Request:
    """What a session is opened for, and who looks whether that is still wanted."""

    image: Image
    need: Need
    ticket: Ticket
    visit: Visit
    check: Check


def _telling(visit: Visit) -> Callable[[object, BaseException | None, object], None]:
    """Return an exit function that tells a visit what went wrong."""

    def tell(_cls: object, exc: BaseException | None, _traceback: object) -> None:
        if exc:
            visit.failed(exc)

    return tell


class _Grip:
    """A lock, and the back end whose writes it outlasts."""

    def __init__(self) -> None:
        self.lock: Lock | None = None
        self.backend: Backend | None = None

    def share(self) -> None:
        """Let others in. The mark stays: whether all who share were done is asked when one dies."""
        if self.lock:
            self.lock.release(settled=False)
            self.lock = None

    def release(self) -> None:
        """Release the lock; it stays marked while a write, ours or a dead holder's, may land."""
        if self.lock:
            settled = not self.lock.abandoned and (self.backend is None or self.backend.settled)
            self.lock.release(settled=settled)
