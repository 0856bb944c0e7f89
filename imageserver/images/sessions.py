# SPDX-License-Identifier: Apache-2.0
"""One request's right to one image: lock, then slot, then open back end; given back in reverse.

    operation           lock        slot
    read                -           READ
    write, zero, PUT    exclusive   WRITE
    flush, extents      exclusive   OTHER (shown, not limited)

With MAX_WRITERS above 1, range writes, zero and flush of one image may share it: each holds the
lock only until it has claimed a slot, which names the image. An operation that wants the image
alone takes the lock, and is refused while there is such a slot.

Only an image whose server has multi-conn is shared, which is known once it is open. Three cases:

1. The server at the image's socket is known to lack multi-conn, or the kind or the operation
   does not share: the image is taken alone. If the server has multi-conn after all (it was
   replaced), other writers are let in from then on.
2. Otherwise the image is taken shared and opened, and the server has multi-conn: the operation
   begins.
3. As 2, but the server lacks it: everything is given back before a byte is written, and the image
   is taken alone. Of several requests that meet there, the last to give back meets no other, so
   that one of them succeeds.

A streamed answer outlives the responder, so the right to the image is an object. The code that
opens a ``Session`` closes it; ``close()`` is idempotent and gives all three back.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from imageserver.core.errors import ImageBusy
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import (
    Backend,
    Backends,
    Intent,
    Lock,
    Locks,
    Meter,
    Slots,
    Ticket,
)
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer
from imageserver.transfers.requests import Request


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


class Session:
    """An open image and the right to use it. Close it; closing twice is harmless."""

    def __init__(self, backend: Backend, held: ExitStack, request: Request) -> None:
        self.backend = backend
        self.size = backend.size
        #: Others may write to the image at the same time, elsewhere in it.
        self.shared = False
        #: The account, to which operations tell their progress.
        self.request = request
        self._held = held

    @property
    def info(self) -> ImageInfo:
        """What the image can do."""
        return self.backend.info

    def close(self) -> None:
        """Give everything back: the back end first, the lock last."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _cls: object, exc: BaseException | None, _traceback: object) -> None:
        if exc:
            self.request.failed(exc)
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

    def open(self, transfer: Transfer, need: Need, request: Request) -> Session:
        """Take what ``need`` says, in order, without waiting for a request that lives.

        The request leaves the transfer when the session is closed.

        Raises:
            ImageBusy: the image's lock is held.
            NoSlot: all slots of the kind are taken.
            StateUnavailable: locks or slots cannot be used now.
            BackendError, BackendTimeout, FileAccessError: the image cannot be opened.
            ClientGone: nobody waits for it any more.
        """
        request.needs(need.operation, need.kind)
        image = transfer.image.pinned() if need.locked else transfer.image
        key = self._key(image) if need.locked else ""
        ticket = Ticket(transfer.id, need.operation, key, request.client)
        wanted = _Wanted(image, need, ticket, request)
        with ExitStack() as held:
            held.callback(request.leave)
            backend, shared = self._take_or_share(held, wanted)
            session = Session(backend, held.pop_all(), request)
            session.shared = shared
            if self._meter:
                request.counts(self._meter.meter(need.operation, transfer.image.kind.name))
            return session
        raise AssertionError  # an ExitStack swallows nothing

    def _take_or_share(self, held: ExitStack, wanted: "_Wanted") -> tuple[Backend, bool]:
        """Take what the session holds; True: others may write to the image at the same time."""
        image = wanted.image
        if not (wanted.need.shares and self._shares_lock and image.kind.shares_writers):
            backend, _ = self._take(held, wanted)
            return backend, False
        is_new = not self._is_single(image)
        if is_new:
            with ExitStack() as tried:
                backend, _ = self._take(tried, wanted, shared=True)
                if backend.info.multi_conn:
                    held.push(tried.pop_all())
                    return backend, True
            self._remember_single(image)
        backend, lock = self._take(held, wanted, brief=is_new)
        shared = backend.info.multi_conn
        if shared:
            self._single.pop(image, None)
            lock.share()
        return backend, shared

    def _is_single(self, image: Image) -> bool:
        return self._single.get(image, _UNSEEN) == self._stamp(image)

    def _remember_single(self, image: Image) -> None:
        if len(self._single) >= _MOST_SINGLE:
            self._single.clear()
        self._single[image] = self._stamp(image)

    def _take(
        self, held: ExitStack, wanted: "_Wanted", *, shared: bool = False, brief: bool = False
    ) -> "tuple[Backend, _HeldLock]":
        image, need, request = wanted.image, wanted.need, wanted.request
        mine = _HeldLock()
        if need.locked:
            mine.lock = self._lock(image, wanted.ticket.image, shared=shared, brief=brief)
            held.callback(mine.release)
        slot = self._slots.claim(need.kind, wanted.ticket)
        held.callback(slot.release)
        if mine.lock and not mine.lock.is_in_place():
            # Who comes from now on sees the slot; who came before that may have a new lock.
            raise ImageBusy
        request.holds(slot)
        held.push(_noting_failure(request))
        if mine.lock and mine.lock.abandoned:
            self._backends.settle(image, request.check)
            mine.lock.abandoned = False
        if shared:
            mine.share()
        backend = mine.backend = self._backends.open(image, need.intent, request.check)
        held.callback(backend.close)
        request.uses(backend)
        return backend, mine

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
class _Wanted:
    """What a session is opened for."""

    image: Image
    need: Need
    ticket: Ticket
    request: Request


def _noting_failure(request: Request) -> Callable[[object, BaseException | None, object], None]:
    """Return an exit function that notes what went wrong."""

    def note(_cls: object, exc: BaseException | None, _traceback: object) -> None:
        if exc:
            request.failed(exc)

    return note


class _HeldLock:
    """A lock, and the back end whose writes it outlasts."""

    def __init__(self) -> None:
        self.lock: Lock | None = None
        self.backend: Backend | None = None

    def share(self) -> None:
        """Let others share the image. The mark stays, for the case that a sharer dies."""
        if self.lock:
            self.lock.release(settled=False)
            self.lock = None

    def release(self) -> None:
        """Release the lock; it stays marked while a write, ours or a dead holder's, may land."""
        if self.lock:
            settled = not self.lock.abandoned and (self.backend is None or self.backend.settled)
            self.lock.release(settled=settled)
