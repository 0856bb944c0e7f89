# SPDX-License-Identifier: Apache-2.0
"""Requests to transfers that can expire: they keep it alive, and can be cut.

Tracked are all registered transfers, and files that ask for it. Four times a second one thread
of the process looks after the requests there: it notes that the transfer is in use and what has
been done with it, where all processes see that; and where a control program asks for a
request's end, it cuts the request.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from imageserver.core.errors import Exhausted, StateUnavailable
from imageserver.core.ports import Account, Activity
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer
from imageserver.transfers.lookup import Catalogue
from imageserver.transfers.requests import Request

log = logging.getLogger(__name__)

#: A forced end must come within a second (docs/api.md), and the shortest idle timeout is one.
_BEAT_SECONDS = 0.25
#: How often what is left of forgotten transfers is removed.
_PRUNE_SECONDS = 600.0


class Use:
    """One request's use of a transfer that can expire."""

    def __init__(
        self,
        request: Request,
        activity: Activity,
        began_ns: int,
        ended: Callable[["Use"], None],
    ) -> None:
        self._request = request
        self._activity = activity
        self._began_ns = began_ns
        self._ended = ended
        self._lock = threading.Lock()
        self._is_closed = self._is_cut = False
        self._told = Account()
        activity.touch()

    def beat(self) -> None:
        """Note that the use goes on, or cut the request."""
        with self._lock:
            if self._is_closed:
                return
            if not self._is_cut and self._activity.is_cut(self._began_ns):
                self._is_cut = True
                self._request.cut()
            self._tell(wait=False)

    def _tell(self, *, wait: bool) -> None:
        request, told = self._request, self._told
        read = request.done if request.kind is Kind.READ else 0
        written = request.done if request.kind is Kind.WRITE else 0
        now = Account(read, written, request.image_error)
        if now != told:
            more = Account(read - told.bytes_read, written - told.bytes_written, now.last_error)
            if self._activity.add(more, wait=wait):
                self._told = now
        self._activity.touch()

    def close(self) -> None:
        """End the use, and note all that was done. Never fails, may be called twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            try:
                self._tell(wait=True)
            except StateUnavailable as exc:
                log.warning("a request's end was not noted: %s", exc)
            finally:
                self._activity.close()
                self._ended(self)


class Tracker:
    """Lets requests in to transfers, and looks after the uses of this process."""

    def __init__(
        self,
        catalogue: Catalogue,
        prune: Callable[[], None],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``prune`` is called every ten minutes, to remove what is left of forgotten transfers."""
        self._catalogue = catalogue
        self._prune = prune
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._uses: set[Use] = set()
        self._beating: threading.Thread | None = None

    def enter(self, request: Request, transfer_id: str, *, probes: bool = False) -> Transfer:
        """Look an id up for a request, which uses the transfer until ``Request.leave``.

        ``probes``: see ``Catalogue.find``.

        Raises:
            UnknownImage: nothing has this id.
            StateUnavailable: that cannot be told.
            Exhausted: there is no thread to keep the transfer alive.
        """
        request.asks_for(transfer_id)
        began_ns = self._now_ns()  # before the look: see Activity.is_cut
        found = self._catalogue.find(transfer_id, probes=probes)
        if found.activity is None:
            request.found(found.transfer)
            return found.transfer
        with contextlib.ExitStack() as held:
            held.callback(found.activity.close)
            use = Use(request, found.activity, began_ns, self._discard)
            held.pop_all()
        with self._lock:
            self._uses.add(use)
        try:
            self._start()
        except RuntimeError as exc:
            if not probes:  # which are too short to need it
                use.close()
                raise Exhausted(str(exc)) from exc
        request.found(found.transfer, use.close)
        return found.transfer

    def _start(self) -> None:
        with self._lock:
            if self._beating is None:
                beating = threading.Thread(target=self._beat, name="tracker", daemon=True)
                beating.start()
                self._beating = beating

    def _discard(self, use: Use) -> None:
        with self._lock:
            self._uses.discard(use)

    def _beat(self) -> None:
        pruned = time.monotonic()
        failing: frozenset[Use] = frozenset()
        while True:
            time.sleep(_BEAT_SECONDS)
            failing = self.beat(failing)
            if time.monotonic() - pruned > _PRUNE_SECONDS:
                pruned = time.monotonic()
                _attempt(self._prune, "pruning")

    def beat(self, failing: frozenset[Use] = frozenset()) -> frozenset[Use]:
        """Let every use beat, whatever becomes of another; return those that cannot.

        Those that could not the last time are told of no more.
        """
        with self._lock:
            uses = list(self._uses)
        return frozenset(
            use for use in uses if not _attempt(use.beat, "a visit", is_told=use in failing)
        )


def _attempt(job: Callable[[], None], what: str, *, is_told: bool = False) -> bool:
    """Do a job of those that come again and again; False where it failed."""
    try:
        job()
    except StateUnavailable as exc:
        if not is_told:
            log.warning("%s was not noted: %s", what, exc)
    except Exception:  # one job must not end all others, for all time
        if not is_told:
            log.exception("%s failed", what)
    else:
        return True
    return False
