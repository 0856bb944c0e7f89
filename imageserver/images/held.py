# SPDX-License-Identifier: Apache-2.0
"""What a session holds of an image: a lock, a slot, an open back end. Given back in reverse, once.

Who takes them, in which order and when, is said in ``sessions``.
"""

from imageserver.core.ports import Backend, Lock, Slot
from imageserver.transfers.requests import Request


class Held:
    """The parts of a session, as far as it has them."""

    __slots__ = ("backend", "lock", "request", "slot", "takes_several")

    def __init__(self) -> None:
        self.lock: Lock | None = None
        self.slot: Slot | None = None
        self.backend: Backend | None = None
        #: Who is told what goes wrong from now on.
        self.request: Request | None = None
        #: The operation may share the image, and the image's server has multi-conn.
        self.takes_several = False

    @property
    def is_shared(self) -> bool:
        """Others may have the image at the same time."""
        return self.takes_several and self.lock is None

    def has(self, slot: Slot, request: Request) -> None:
        """Take over a slot."""
        self.slot, self.request = slot, request
        request.holds(slot)

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

    def give_back(self, exc: BaseException | None = None) -> None:
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
