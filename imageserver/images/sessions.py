# SPDX-License-Identifier: Apache-2.0
"""One request's right to one image: lock, then slot, then open back end; given back in reverse.

    operation           lock        slot
    read                -           READ
    write, zero, PUT    exclusive   WRITE
    checksum            exclusive   READ
    qcow2 stream        together    READ (with other such streams of the image, nobody else)
    flush, extents      exclusive   OTHER (shown, not limited)

With more than one writer of an image allowed, range writes, zero and flush of one image may share
it: the slot, which names the image, is enough then. Who wants the image alone takes the lock, and
gets no slot beside another. Who shares takes the lock only where somebody has died (below).

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
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Self

from imageserver.core.errors import BackendError
from imageserver.core.kinds import Image, ImageInfo
from imageserver.core.ports import (
    Backend,
    Backends,
    Check,
    Intent,
    Locks,
    Slots,
    Ticket,
)
from imageserver.core.reports import Meter
from imageserver.core.slots import Deaths, Kind
from imageserver.core.transfer import Transfer
from imageserver.images.held import Held
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
        self, image: Image, held: Held, request: Request, opener: Callable[[Check], Backend]
    ) -> None:
        assert held.backend  # noqa: S101 - it was opened
        self.backend = held.backend
        self.size = self.backend.size
        #: Others may write to the image at the same time, elsewhere in it.
        self.shared = held.is_shared
        #: The kind of image can say what of it is data.
        self.has_extents = not image.kind.extents_refusal
        #: The account, to which operations tell their progress.
        self.request = request
        self._held: Held | None = held
        self._opener = opener
        self._links: list[Backend] = []

    @property
    def info(self) -> ImageInfo:
        """What the image can do."""
        return self.backend.info

    def open_link(self, check: Check) -> Backend:
        """Open the image once more, to read it; closed with the session. From any thread.

        Only while the session is open, which its thread sees to. Raises what ``Backends.open`` does
        within a second or so.

        Raises:
            BackendError: another file or server has taken the image's place.
        """
        link = self._opener(check)
        self._links.append(link)
        if link.info.identity != self.info.identity:
            raise BackendError("another file or server has taken the image's place")
        return link

    def close(self) -> None:
        """Give everything back: the back end first, the lock last."""
        held, self._held = self._held, None
        if held is None:
            return
        try:
            while self._links:
                self._links.pop().close()
        finally:
            try:
                held.give_back()
            finally:
                self.request.leave()

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
        shares_lock: bool,
        counts_readers: bool,
        meter: Meter,
        stamp: Callable[[Image], object] = lambda image: image.stamp(),
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
        try:
            image = transfer.image.pinned() if is_named else transfer.image
            key = self._key(image) if is_named else ""
            ticket = Ticket(transfer.id, need.operation, key, request.client)
            shares = need.shares and self._shares_lock and image.kind.shares_writers
            held = self._take_or_share(_Wanted(image, transfer, need, ticket, request, shares))
        except BaseException:
            request.leave()
            raise
        request.counts(self._meter.meter(need.operation, image.kind.name))
        # INSPECT: a server without room for one more link must not be waited for.
        opener = partial(self._backends.open, image, Intent.INSPECT)
        return Session(image, held, request, opener)

    def _take_or_share(self, wanted: "_Wanted") -> Held:
        """Take what the session holds."""
        image = wanted.image
        if not wanted.shares:
            claim = self._claim_shared if wanted.need.together else self._claim
            return self._take(wanted, claim)
        is_new = not self._is_single(image)
        if is_new:
            held = self._take(wanted, self._claim_shared)
            if held.is_shared:
                return held
            held.give_back()
            self._remember_single(image)
        held = self._take(wanted, self._claim_in_turn if is_new else self._claim)
        if held.takes_several:
            self._single.pop(image, None)
            held.share()
        return held

    def _is_single(self, image: Image) -> bool:
        if not self._single:
            return False  # mostly, at once
        known = self._single.get(image, _UNSEEN)
        return known is not _UNSEEN and known == self._stamp(image)

    def _remember_single(self, image: Image) -> None:
        if len(self._single) >= _MOST_SINGLE:
            self._single.clear()
        self._single[image] = self._stamp(image)

    def _take(self, wanted: "_Wanted", claim: Callable[[Held, "_Wanted"], None]) -> Held:
        """Claim the image in one of the ways below, then open it."""
        held = Held()
        try:
            claim(held, wanted)
            need, request = wanted.need, wanted.request
            backend = held.backend = self._backends.open(
                wanted.image, need.intent, request.check, wanted.transfer
            )
            held.takes_several = wanted.shares and backend.info.multi_conn
            request.uses(backend)
        except BaseException as exc:
            held.give_back(exc)
            raise
        return held

    def _claim(self, held: Held, wanted: "_Wanted") -> None:
        """Take the lock, for as long as the session lasts, if it is needed; and a slot."""
        need = wanted.need
        if need.locked:
            held.lock = self._locks.acquire(wanted.image)
        self._claim_alone(held, wanted)

    def _claim_in_turn(self, held: Held, wanted: "_Wanted") -> None:
        """Take both, and wait for others who have the lock until their slots show them."""
        held.lock = self._locks.acquire_briefly(wanted.image)
        self._claim_alone(held, wanted)

    def _claim_shared(self, held: Held, wanted: "_Wanted") -> None:
        """Take a slot, which lets in who shares the image and keeps out who wants it alone.

        The lock is needed until then only where writes of the dead may have to be waited for. This
        process knows of none if nobody has died since it had the lock last.
        """
        settled = self._locks.settled_at(wanted.image)
        if settled is not None:
            need = wanted.need
            slot = self._slots.claim(need.kind, wanted.ticket, together=need.together)
            if slot.deaths.count == settled:
                held.has(slot, wanted.request)
                return
            slot.release()
        held.lock = self._locks.acquire_briefly(wanted.image)
        deaths = self._claim_slot(held, wanted, alone=False)
        if not held.lock.is_settled(deaths):
            held.unlock()  # that may take as long as the back end may: others wait for seconds only
            self._settle(wanted)
            held.lock = self._locks.acquire_briefly(wanted.image)
            held.lock.settle(deaths)
        held.unlock()

    def _claim_alone(self, held: Held, wanted: "_Wanted") -> None:
        """Take a slot, under the lock if there is one."""
        deaths = self._claim_slot(held, wanted, alone=held.lock is not None)
        if held.lock and not held.lock.is_settled(deaths):
            self._settle(wanted)
            held.lock.settle(deaths)

    def _claim_slot(self, held: Held, wanted: "_Wanted", *, alone: bool) -> Deaths:
        need = wanted.need
        slot = self._slots.claim(need.kind, wanted.ticket, alone=alone, together=need.together)
        held.has(slot, wanted.request)
        return slot.deaths

    def _settle(self, wanted: "_Wanted") -> None:
        """Wait for what a dead holder left under way."""
        self._backends.settle(wanted.image, wanted.request.check)


class _Wanted(NamedTuple):
    """What a session is opened for."""

    image: Image
    transfer: Transfer
    need: Need
    ticket: Ticket
    request: Request
    shares: bool
    """Others may have the image at the same time, where its server has multi-conn."""
