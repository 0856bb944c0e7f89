# SPDX-License-Identifier: Apache-2.0
"""One request's right to one image: lock, then slot, then open back end; given back in reverse.

    operation           lock        slot
    read                -           READ
    write, zero, PUT    exclusive   WRITE
    checksum            exclusive   READ
    qcow2 stream        together    READ (with other such streams of the image, nobody else)
    flush, extents      exclusive   OTHER (shown, not limited)

With more than one writer of an image allowed, range writes, zero and flush of one image may share
it: each holds the lock only until it has claimed a slot, which names the image. An operation that
wants the image alone takes the lock, and gets no slot while there is such a one.

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
from functools import partial
from typing import Self

from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import (
    Backend,
    Backends,
    Check,
    Intent,
    Lock,
    Locks,
    Slot,
    Slots,
    Ticket,
)
from imageserver.core.reports import Meter
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
    together: bool = False
    """Any number of this kind may have the image at once, and nobody else."""


READ = Need("read", Intent.READ, locked=False, kind=Kind.READ)
WRITE = Need("write", Intent.WRITE, locked=True, kind=Kind.WRITE, shares=True)
REPLACE = Need("replace", Intent.REPLACE, locked=True, kind=Kind.WRITE)
#: Of a request that depends on the image's state: no other writer may change that meanwhile.
WRITE_ALONE = Need("write", Intent.WRITE, locked=True, kind=Kind.WRITE)
ZERO = Need("zero", Intent.WRITE, locked=True, kind=Kind.WRITE, shares=True)
ZERO_ALONE = Need("zero", Intent.WRITE, locked=True, kind=Kind.WRITE)
FLUSH = Need("flush", Intent.FLUSH, locked=True, kind=Kind.OTHER, shares=True)
EXTENTS = Need("extents", Intent.EXTENTS, locked=True, kind=Kind.OTHER)
CHECKSUM = Need("checksum", Intent.EXTENTS, locked=True, kind=Kind.READ)
QCOW2 = Need("qcow2", Intent.EXTENTS, locked=True, kind=Kind.READ, together=True)
DIRTY_QCOW2 = Need("qcow2", Intent.DIRTY_EXTENTS, locked=True, kind=Kind.READ, together=True)
DIRTY_EXTENTS = Need("extents", Intent.DIRTY_EXTENTS, locked=True, kind=Kind.OTHER)


#: More exports without multi-conn than one worker has to do with before it is replaced.
_MOST_SINGLE = 1024

_UNSEEN = object()


class Session:
    """An open image and the right to use it. Close it; closing twice is harmless."""

    def __init__(
        self,
        backend: Backend,
        held: ExitStack,
        request: Request,
        opener: Callable[[Check], Backend],
    ) -> None:
        self.backend = backend
        self.size = backend.size
        #: Others may write to the image at the same time, elsewhere in it.
        self.shared = False
        #: The kind of image can say what of it is data.
        self.has_extents = True
        #: The account, to which operations tell their progress.
        self.request = request
        self._held = held
        self._opener = opener

    @property
    def info(self) -> ImageInfo:
        """What the image can do."""
        return self.backend.info

    def open_link(self, check: Check) -> Backend:
        """Open the image once more, to read it; closed with the session. From any thread.

        Only while the session is open, which its thread sees to. Raises what ``Backends.open`` does
        within a second or so.
        """
        link = self._opener(check)
        self._held.callback(link.close)
        return link

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
        counts_readers: bool = False,
        stamp: Callable[[Image], object] = lambda image: image.stamp(),
        meter: Meter | None = None,
    ) -> None:
        """``shares_lock``: range writes, zero and flush of one export may run side by side.

        ``counts_readers``: one image may have a number of readers, whose slots name it therefore.
        ``stamp`` changes when the server that an image names is another one.
        """
        self._shares_lock = shares_lock
        self._counts_readers = counts_readers
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
            NoSlot: all slots of the kind are taken, or all that the image may have.
            StateUnavailable: locks or slots cannot be used now.
            BackendError, BackendTimeout, FileAccessError: the image cannot be opened.
            ClientGone: nobody waits for it any more.
        """
        request.needs(need.operation, need.kind)
        # What is counted is what is opened: it stays where links lead now, as under a lock.
        is_named = need.locked or (self._counts_readers and need.kind is Kind.READ)
        image = transfer.image.pinned() if is_named else transfer.image
        key = self._key(image) if is_named else ""
        ticket = Ticket(transfer.id, need.operation, key, request.client)
        wanted = _Wanted(image, need, ticket, request)
        with ExitStack() as held:
            held.callback(request.leave)
            backend, shared = self._take_or_share(held, wanted)
            # INSPECT: a server without room for one more link must not be waited for.
            opener = partial(self._backends.open, image, Intent.INSPECT)
            session = Session(backend, held.pop_all(), request, opener)
            session.has_extents = not image.kind.extents_refusal
            session.shared = shared
            if self._meter:
                request.counts(self._meter.meter(need.operation, transfer.image.kind.name))
            return session
        raise AssertionError  # an ExitStack swallows nothing

    def _take_or_share(self, held: ExitStack, wanted: "_Wanted") -> tuple[Backend, bool]:
        """Take what the session holds; True: others may write to the image at the same time."""
        image = wanted.image
        if wanted.need.together:
            backend, _ = self._take(held, wanted, shared=True)
            return backend, False
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
        backend, mine = self._take(held, wanted, brief=is_new)
        shared = backend.info.multi_conn
        if shared:
            self._single.pop(image, None)
            mine.share()
        return backend, shared

    def _is_single(self, image: Image) -> bool:
        known = self._single.get(image, _UNSEEN)
        return known is not _UNSEEN and known == self._stamp(image)

    def _remember_single(self, image: Image) -> None:
        if len(self._single) >= _MOST_SINGLE:
            self._single.clear()
        self._single[image] = self._stamp(image)

    def _take(
        self, held: ExitStack, wanted: "_Wanted", *, shared: bool = False, brief: bool = False
    ) -> "tuple[Backend, _Held]":
        """Take what ``wanted`` needs; who shares has the lock only until its slot shows it.

        ``brief``: also wait for others who have the lock for as long as that.
        """
        image, need, request = wanted.image, wanted.need, wanted.request
        mine = _Held()
        held.push(mine.give_back)
        if need.locked:
            acquire = self._locks.acquire_briefly if shared or brief else self._locks.acquire
            mine.lock = acquire(image)
        mine.slot = slot = self._slots.claim(
            need.kind,
            wanted.ticket,
            alone=need.locked and not shared,
            together=need.together,
        )
        mine.request = request
        request.holds(slot)
        if mine.lock and not mine.lock.is_settled(slot.deaths):
            self._backends.settle(image, request.check)
            mine.lock.settle(slot.deaths)
        if shared:
            mine.unlock()
        backend = mine.backend = self._backends.open(
            image, need.intent, request.check, wanted.ticket.transfer
        )
        request.uses(backend)
        return backend, mine


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a session is opened for."""

    image: Image
    need: Need
    ticket: Ticket
    request: Request


class _Held:
    """What a session holds: given back in reverse, once."""

    def __init__(self) -> None:
        self.lock: Lock | None = None
        self.slot: Slot | None = None
        self.backend: Backend | None = None
        #: Who is told what goes wrong from now on.
        self.request: Request | None = None

    def unlock(self) -> None:
        """Let others share the image: the slot shows them that this one does."""
        lock, self.lock = self.lock, None
        if lock:
            lock.release()

    def share(self) -> None:
        """Let others share the image, which this one had alone."""
        if self.slot:
            self.slot.share()
        self.unlock()

    def give_back(self, _cls: object, exc: BaseException | None, _traceback: object) -> None:
        """Close the back end; then free the slot, which says if a write may still be under way."""
        if exc and self.request:
            self.request.failed(exc)
        backend, slot = self.backend, self.slot
        try:
            if backend:
                backend.close()
        finally:
            try:
                if slot:
                    slot.release(settled=backend is None or backend.settled)
            finally:
                self.unlock()
