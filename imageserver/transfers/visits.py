# SPDX-License-Identifier: Apache-2.0
"""Requests as visits to transfers: who may come in, and what is remembered of each visit.

    begin --> [ lock, slot, back end: images/sessions.py ] --> close
                  ^ four times a second: I am here; so much is done; must I go?

Only transfers that can expire keep track of their visits: all registered ones, and files
that ask for it. The beat keeps a transfer of a long request alive, brings the bytes done so
far to where all processes see them, and cuts a visit where a control program asks for it:
the client's connection is shut down and the back end stopped, so that whoever waits fails.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from imageserver.core.errors import Exhausted, StateUnavailable, UnknownImage
from imageserver.core.ports import Account, Activities, Activity, Backend, Owned, Transfers
from imageserver.core.slots import Kind
from imageserver.core.transfer import Transfer, has_expired, is_valid_id
from imageserver.transfers.fileage import FileAge

log = logging.getLogger(__name__)

#: A forced end must come within a second (docs/api.md), and the shortest idle timeout is one.
_BEAT_SECONDS = 0.25
#: How often what is left of forgotten transfers is removed.
_PRUNE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Found:
    """A transfer that counts now; ``activity`` where it can expire."""

    transfer: Transfer
    activity: Activity | None


class Catalogue:
    """All transfers: those registered, then those of the control program's files."""

    def __init__(
        self,
        files: Transfers,
        registered: Transfers | None,
        activities: Activities,
        ages: FileAge | None = None,
        require: Callable[[], None] = lambda: None,
    ) -> None:
        """``registered`` is None where nothing can be registered.

        ``require`` raises ``StateUnavailable`` where what is registered, and what is in use, are
        not what other processes see.
        """
        self._require = require
        self._files = files
        self._registered = registered
        self._activities = activities
        self._ages = ages or FileAge()

    def find(self, transfer_id: str, *, visit: bool = True, probes: bool = False) -> Found:
        """Look an id up; ``visit``: as one who uses it, and closes the activity afterwards.

        ``probes``: as one who touches no image, and for whom a control program's file will do
        where it cannot be told what is registered, or its use not be noted.

        Raises:
            UnknownImage: nothing, or nothing that has not expired, has this id.
            StateUnavailable: that cannot be told.
        """
        if not is_valid_id(transfer_id):
            raise UnknownImage(transfer_id)
        try:
            return self._find_registered(transfer_id, visit) or self._find_file(transfer_id, visit)
        except StateUnavailable:
            if probes:
                with contextlib.suppress(UnknownImage):
                    return Found(self._files.get(transfer_id), None)
            raise

    def _find_registered(self, transfer_id: str, visit: bool) -> Found | None:  # noqa: FBT001
        if self._registered is None:
            return None
        self._require()
        # In this order: see registered.py.
        activity = self._activities.find(Owned.REGISTERED, transfer_id, visit=visit)
        if activity is None:
            return None
        with contextlib.ExitStack() as held:
            held.callback(activity.close)
            try:
                transfer = self._registered.get(transfer_id)
            except UnknownImage:
                return None
            # Registering is use, so the time of the file itself does not count.
            _check(transfer, activity.idle_ns())
            held.pop_all()
        return Found(replace(transfer, id=transfer_id), activity)

    def _find_file(self, transfer_id: str, visit: bool) -> Found:  # noqa: FBT001
        transfer = self._files.get(transfer_id)
        if transfer.idle_seconds is None:
            return Found(transfer, None)
        self._require()
        activity = self._activities.find(Owned.FILE, transfer_id, visit=visit)
        with contextlib.ExitStack() as held:
            if activity:
                held.callback(activity.close)
            _check(transfer, self._unused_ns(transfer, activity))
            if activity is None:
                activity = self._activities.make(Owned.FILE, transfer.id)
                held.callback(activity.close)
            if visit and activity.changed_ns != transfer.changed_ns:
                activity.changed_ns = transfer.changed_ns
            held.pop_all()
        return Found(transfer, activity)

    def _unused_ns(self, transfer: Transfer, activity: Activity | None) -> int:
        """Return for how long nobody has used a file's transfer. A changed file begins anew.

        Its age counts only until it is used: then that is known, by a clock which nobody sets.
        """
        if activity is None:
            return self._ages.age_ns(transfer.changed_ns)
        if activity.changed_ns == transfer.changed_ns:
            return activity.idle_ns()
        return min(self._ages.age_ns(transfer.changed_ns), activity.idle_ns())


def _check(transfer: Transfer, unused_ns: int) -> None:
    if has_expired(transfer, unused_ns):
        raise UnknownImage(transfer.id)


class Visit:
    """A request's time at a transfer of which no track is kept."""

    def progress(self, kind: Kind, done: int) -> None:
        """Note how many bytes are done."""

    def failed(self, error: BaseException) -> None:
        """Note what went wrong."""

    def is_wanted(self) -> bool:
        """Tell whether the visit goes on: False once it has been cut."""
        return True

    def uses(self, backend: Backend) -> None:
        """Name the back end that is to be stopped when the visit is cut."""

    def close(self) -> None:
        """End the visit. Never fails, may be called twice."""


UNTRACKED = Visit()


class TrackedVisit(Visit):
    """A request's time at a transfer that can expire. One thread uses it, another one beats."""

    def __init__(
        self,
        activity: Activity,
        began_ns: int,
        disconnect: Callable[[], None],
        ended: Callable[["TrackedVisit"], None],
    ) -> None:
        self._activity = activity
        self._began_ns = began_ns
        self._disconnect = disconnect
        self._ended = ended
        self._lock = threading.Lock()
        self._is_closed = self._is_cut = False
        self._backend: Backend | None = None
        self._read = self._written = 0
        self._told = Account()
        self._error: str | None = None
        activity.touch()

    def progress(self, kind: Kind, done: int) -> None:
        """Note how many bytes are done."""
        if kind is Kind.READ:
            self._read = done
        elif kind is Kind.WRITE:
            self._written = done

    def failed(self, error: BaseException) -> None:
        """Note what went wrong."""
        # A body that nobody iterates any more: the client of a GET has gone.
        name = "ClientGone" if isinstance(error, GeneratorExit) else type(error).__name__
        self._error = f"{name}: {error}".removesuffix(": ")

    def is_wanted(self) -> bool:
        """Tell whether the visit goes on: False once it has been cut."""
        return not self._is_cut

    def uses(self, backend: Backend) -> None:
        """Name the back end that is to be stopped when the visit is cut."""
        with self._lock:
            self._backend = backend
            if self._is_cut:
                backend.stop()

    def beat(self) -> None:
        """Say that the visit goes on, or cut it."""
        with self._lock:
            if self._is_closed:
                return
            if not self._is_cut and self._activity.is_cut(self._began_ns):
                self._cut()
            self._tell(wait=False)

    def _cut(self) -> None:
        self._is_cut = True
        self._disconnect()
        if self._backend:
            self._backend.stop()

    def _tell(self, *, wait: bool) -> None:
        now = Account(self._read, self._written, self._error)
        told = self._told
        if now != told:
            read, written = now.bytes_read - told.bytes_read, now.bytes_written - told.bytes_written
            if self._activity.add(Account(read, written, now.last_error), wait=wait):
                self._told = now
        self._activity.touch()

    def close(self) -> None:
        """End the visit."""
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


class Visits:
    """All visits of this process."""

    def __init__(
        self,
        catalogue: Catalogue,
        prune: Callable[[], None],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``prune`` is called now and then, to remove what is left of forgotten transfers."""
        self._catalogue = catalogue
        self._prune = prune
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._visits: set[TrackedVisit] = set()
        self._beating: threading.Thread | None = None

    def begin(
        self, transfer_id: str, disconnect: Callable[[], None], *, probes: bool = False
    ) -> tuple[Transfer, Visit]:
        """Look an id up, and begin a visit there; ``disconnect`` must cut the client off.

        ``probes``: see ``Catalogue.find``.

        Raises:
            UnknownImage: nothing has this id.
            StateUnavailable: that cannot be told.
            Exhausted: there is no thread to keep the transfer alive.
        """
        began_ns = self._now_ns()  # before the look: see Activity.is_cut
        found = self._catalogue.find(transfer_id, probes=probes)
        if found.activity is None:
            return found.transfer, UNTRACKED
        with contextlib.ExitStack() as held:
            held.callback(found.activity.close)
            visit = TrackedVisit(found.activity, began_ns, disconnect, self._discard)
            held.pop_all()
        with self._lock:
            self._visits.add(visit)
        try:
            self._start()
        except RuntimeError as exc:
            if not probes:  # which are too short to need it
                visit.close()
                raise Exhausted(str(exc)) from exc
        return found.transfer, visit

    def _start(self) -> None:
        with self._lock:
            if self._beating is None:
                beating = threading.Thread(target=self._beat, name="visits", daemon=True)
                beating.start()
                self._beating = beating

    def _discard(self, visit: TrackedVisit) -> None:
        with self._lock:
            self._visits.discard(visit)

    def _beat(self) -> None:
        pruned = time.monotonic()
        failing: frozenset[TrackedVisit] = frozenset()
        while True:
            time.sleep(_BEAT_SECONDS)
            failing = self.beat(failing)
            if time.monotonic() - pruned > _PRUNE_SECONDS:
                pruned = time.monotonic()
                _attempt(self._prune, "pruning")

    def beat(self, failing: frozenset[TrackedVisit] = frozenset()) -> frozenset[TrackedVisit]:
        """Let every visit beat, whatever becomes of another; return those that cannot.

        Those that could not the last time are told of no more.
        """
        with self._lock:
            visits = list(self._visits)
        return frozenset(
            visit
            for visit in visits
            if not _attempt(visit.beat, "a visit", is_told=visit in failing)
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
