# SPDX-License-Identifier: Apache-2.0
"""One request's right to one image: lock, then slot, then open back end; given back in reverse.

    operation           lock        slot
    read                -           READ
    write, zero, PUT    exclusive   WRITE
    flush, extents      exclusive   OTHER (shown, not limited)

A streamed answer outlives the code that began it, so the right belongs to an object. Who
opens a ``Session`` sees to its ``close()``, which is idempotent and gives all three back.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from imageserver.ports import Backend, Backends, ImageInfo, Intent, Lock, Locks, Slot, Slots, Ticket
from imageserver.slots import Kind
from imageserver.transfers import Image, Transfer


@dataclass(frozen=True, slots=True)
class Need:
    """What an operation needs before it may touch an image."""

    operation: str
    intent: Intent
    locked: bool
    kind: Kind


READ = Need("read", Intent.READ, locked=False, kind=Kind.READ)
WRITE = Need("write", Intent.WRITE, locked=True, kind=Kind.WRITE)
REPLACE = Need("replace", Intent.REPLACE, locked=True, kind=Kind.WRITE)
ZERO = Need("zero", Intent.WRITE, locked=True, kind=Kind.WRITE)
FLUSH = Need("flush", Intent.FLUSH, locked=True, kind=Kind.OTHER)
EXTENTS = Need("extents", Intent.EXTENTS, locked=True, kind=Kind.OTHER)
DIRTY_EXTENTS = Need("extents", Intent.DIRTY_EXTENTS, locked=True, kind=Kind.OTHER)


class Session:
    """An open image and the right to use it. Close it; closing twice is harmless."""

    def __init__(self, backend: Backend, slot: Slot, held: ExitStack) -> None:
        self.backend = backend
        self.size = backend.size
        self._slot = slot
        self._held = held

    @property
    def info(self) -> ImageInfo:
        """What the image can do."""
        return self.backend.info

    def progress(self, done: int, expected: int) -> None:
        """Show operators how far the operation has come, in bytes."""
        self._slot.progress(done, expected)

    def close(self) -> None:
        """Give everything back: the back end first, the lock last."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Sessions:
    """Opens sessions; one for all requests."""

    def __init__(
        self, locks: Locks, slots: Slots, backends: Backends, key: Callable[[Image], str]
    ) -> None:
        self._locks = locks
        self._slots = slots
        self._backends = backends
        self._key = key

    def open(self, transfer: Transfer, need: Need, client: str) -> Session:
        """Take what ``need`` says, in order, without ever waiting for another request.

        Raises:
            ImageBusy: the image's lock is held.
            NoSlot: all slots of the kind are taken.
            BackendError, BackendTimeout, FileAccessError: the image cannot be opened.
        """
        with ExitStack() as held:
            grip = _Grip()
            if need.locked:
                grip.lock = self._locks.acquire(transfer.image)
                held.callback(grip.release)
            image = self._key(transfer.image) if need.locked else ""
            ticket = Ticket(transfer.id, need.operation, image, client)
            slot = self._slots.claim(need.kind, ticket)
            held.callback(slot.release)
            if grip.lock and grip.lock.abandoned:
                self._backends.settle(transfer.image)
                grip.lock.abandoned = False
            backend = grip.backend = self._backends.open(transfer.image, need.intent)
            held.callback(backend.close)
            return Session(backend, slot, held.pop_all())
        raise AssertionError  # an ExitStack swallows nothing


class _Grip:
    """A lock, and the back end whose writes it outlasts."""

    def __init__(self) -> None:
        self.lock: Lock | None = None
        self.backend: Backend | None = None

    def release(self) -> None:
        """Release the lock; it stays marked while a write, ours or a dead holder's, may land."""
        if self.lock:
            settled = not self.lock.abandoned and (self.backend is None or self.backend.settled)
            self.lock.release(settled=settled)
