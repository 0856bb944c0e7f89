# SPDX-License-Identifier: Apache-2.0
"""From a server to a file: only data is moved, by several connections; it can always be resumed.

    OPTIONS, size, extents --> target opened --> pieces moved --> extents again, proof --> FILE

``target`` has the file; here is the order of requests, and where the bytes of answers go.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import Busy, Different, Interrupted, LocalFailure, Transient
from imageserver.client.http.answers import Abilities
from imageserver.client.http.made_file import MadeFile
from imageserver.client.http.remote import Remote
from imageserver.client.local.formats import LocalImage
from imageserver.client.local.raw import nonzero
from imageserver.client.moving.layout import Layout, ask_layout
from imageserver.client.moving.made import Made
from imageserver.client.moving.movers import Advance, Movers
from imageserver.client.moving.received import BySamples, OfDisk, Verifier, verifier
from imageserver.client.moving.target import Target
from imageserver.client.moving.verify import compare_samples, same_length
from imageserver.client.moving.wanted import Wanted, check_file
from imageserver.client.plan import (
    MAX_GAP,
    Piece,
    Range,
    Spans,
    joined,
    long_piece_bytes,
    piece_bytes,
    pieces,
)
from imageserver.client.showing.progress import Watcher

#: How often written data is synced and its state saved, in seconds: what a SIGKILL may cost.
_CHECKPOINT_SECONDS = 2.0
#: How long the last sync after a failure or Ctrl-C may take, in seconds.
_END_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Result:
    """What was done; all in bytes but ``seconds``."""

    size: int
    data: int
    moved: int
    resumed: int
    seconds: float
    verified: bool
    verified_by: str | None
    """``checksum`` (the server's) or ``samples``."""


def download(remote: Remote, wanted: Wanted, watch: Watcher) -> Result:
    """Make ``wanted.file`` what the server has.

    Raises:
        ClientError: it is not; the next run resumes.
    """
    if wanted.format == "qcow2" and not wanted.incremental:
        check_file(wanted)
        budget = RetryBudget(wanted.patience_seconds)
        abilities = retried(remote.abilities, budget, Busy)
        if abilities.has("qcow2"):
            return _download_file(remote, abilities, wanted, watch, budget)
    return _Download(remote, wanted, watch).run()


def _download_file(
    remote: Remote, abilities: Abilities, wanted: Wanted, watch: Watcher, budget: RetryBudget
) -> Result:
    """Fetch the qcow2 file that the server makes of the image, as it is."""
    watch.note("The server makes the qcow2 file.")
    size = retried(remote.size, budget)
    file = retried(lambda: MadeFile(remote), budget)
    as_it_is = replace(wanted, format="raw", made=Made(file.etag, size))
    verifier = None
    if wanted.verify and abilities.has("checksum"):
        verifier = OfDisk(remote, size, wanted.part, budget)
    result = _Download(file, as_it_is, watch, verifier).run()
    return replace(result, size=size)


class _Download:
    def __init__(
        self,
        remote: Remote,
        wanted: Wanted,
        watch: Watcher,
        verifier: Verifier | None = None,
    ) -> None:
        self._remote, self._wanted, self._watch = remote, wanted, watch
        self._budget = RetryBudget(wanted.patience_seconds)
        self._broke = False
        self._verifier = verifier
        self._began = time.monotonic()

    def run(self) -> Result:
        check_file(self._wanted)
        abilities = retried(self._remote.abilities, self._budget, Busy)
        if self._wanted.made:  # what the image has, a file that is made of it has not
            abilities = replace(abilities, features=frozenset())
        self._connections = self._remote.connections(
            self._wanted.connections, abilities.max_readers
        )
        layout = self._ask_layout(abilities)
        if self._wanted.incremental:
            self._note_full(layout)
        if self._wanted.verify and self._verifier is None:
            self._verifier = self._new_verifier(abilities, layout)
        target = Target(self._wanted, layout, self._remote.url)
        with target.claimed():
            done, local = target.open(self._connections, self._compare_samples, self._watch.note)
            with contextlib.closing(local):
                left = layout.data.without(done)
                with _distrusted(target):
                    self._move(layout, target, local, left, done)
                    if self._wanted.made:  # before it is opened as what it claims to be
                        self._wanted.made.require(local)
                self._prove(abilities, layout, target, local, left)
                local.sync()
                with _distrusted(target):
                    target.check_base()
                    _require_unchanged(local)
            target.finish()
        seconds = time.monotonic() - self._began
        total = layout.data.total
        verified = self._verifier.way if self._verifier else None
        moved, resumed = left.total, total - left.total
        return Result(layout.size, total, moved, resumed, seconds, bool(verified), verified)

    def _new_verifier(self, abilities: Abilities, layout: Layout) -> Verifier:
        is_incremental = self._wanted.incremental
        return verifier(self._remote, abilities, layout, self._budget, incremental=is_incremental)

    def _note_full(self, layout: Layout) -> None:
        if not layout.size or layout.changed.total < layout.size:
            return
        bitmap = self._remote.bitmap
        why = {None: " (there may be no bitmap)", "": ": the server uses no bitmap"}.get(bitmap, "")
        self._watch.note(f"All of the image counts as changed{why}.")

    def _ask_layout(self, abilities: Abilities) -> Layout:
        return ask_layout(self._remote, abilities, self._budget, dirty=self._wanted.incremental)

    def _compare_samples(self, local: LocalImage, data: Spans) -> None:
        compare_samples(self._remote, local.read, data, self._budget)

    def _move(
        self,
        layout: Layout,
        target: Target,
        local: LocalImage,
        left: Spans,
        before: list[Range],
    ) -> None:
        """Fetch what is left, and save the state every few seconds and at the end."""
        self._watch.begin("download", layout.data.total, layout.data.total - left.total)
        target.save(before)
        for start, stop in layout.zeros:
            local.zero(start, stop)
        movers = Movers(self._mover(layout, local), self._pieces(left), self._budget, is_proof=True)
        saved = time.monotonic()

        def save(within: float = math.inf) -> None:
            nonlocal saved
            done = joined([*before, *movers.done()])
            local.sync(within)
            target.save(done)
            saved = time.monotonic()

        def tick() -> None:
            self._watch.moved(movers.moved)
            if time.monotonic() - saved >= _CHECKPOINT_SECONDS:
                save()

        try:
            movers.run(self._connections, tick, self._remote.cut)
            save()
        except KeyboardInterrupt as exc:
            _save_unless_interrupted_again(exc, save, local)
            raise Interrupted(
                f"interrupted: the same command goes on with {target.path} where it stopped."
            ) from exc
        except BaseException:
            with contextlib.suppress(LocalFailure):
                save(_END_SECONDS)
            raise

    def _pieces(self, left: Spans) -> Iterator[Piece]:
        size = long_piece_bytes if self._wanted.made else piece_bytes
        return pieces(left, size(left.total, self._connections), MAX_GAP)

    def _mover(self, layout: Layout, local: LocalImage) -> Callable[[Piece, Advance], None]:
        def move(piece: Piece, advance: Advance) -> None:
            try:
                for data in self._remote.read(piece.position, piece.stop):
                    position = piece.position
                    count = self._write(layout, local, piece, data)
                    piece.position = position + len(data)
                    advance(count)
            except Transient:
                self._broke = True
                raise
            if self._verifier:
                self._verifier.finish(piece)

        return move

    def _write(
        self, layout: Layout, local: LocalImage, piece: Piece, data: bytes | bytearray
    ) -> int:
        """Write what is wanted of ``data``, which begins at the piece's position."""
        position = piece.position
        if not layout.is_mapped:
            for first, last in nonzero(data):
                local.write(position + first, memoryview(data)[first:last])
            if self._verifier:
                self._verifier.feed(piece, position, data)
            return len(data)
        count = 0
        for start, stop in piece.wanted(position, position + len(data)):
            whole = stop - start == len(data)
            part = data if whole else data[start - position : stop - position]
            local.write(start, part)
            if self._verifier:
                self._verifier.feed(piece, start, part)
            count += len(part)
        return count

    def _prove(
        self,
        abilities: Abilities,
        layout: Layout,
        target: Target,
        local: LocalImage,
        left: Spans,
    ) -> None:
        """Check that the image is still the same; with --verify, that FILE equals it."""
        now = self._ask_layout(abilities)
        with _distrusted(target):
            same_length(layout.size, now.size)
            is_sampled = self._verifier and self._verifier.way == BySamples.way
            if is_sampled or self._broke or not target.fits(now):
                self._compare_samples(local, now.data)
            if self._verifier:
                self._verifier.check(local, left, self._pieces, self._watch)


@contextlib.contextmanager
def _distrusted(target: Target) -> Iterator[None]:
    """If something differs, have the next run fetch all again."""
    try:
        yield
    except Different as exc:
        target.distrust()
        raise Different(f"{exc}; the next run fetches all again") from exc


def _require_unchanged(local: LocalImage) -> None:
    """Require the files that FILE is based on not to have changed.

    Raises:
        Different: one has.
    """
    try:
        local.require_unchanged()
    except LocalFailure as exc:
        raise Different(str(exc)) from exc


def _save_unless_interrupted_again(
    interrupt: KeyboardInterrupt, save: Callable[[float], None], local: LocalImage
) -> None:
    """Save the state; at a second Ctrl-C, now or while threads were stopping, give up."""
    try:
        if isinstance(interrupt.__context__, KeyboardInterrupt):
            raise interrupt
        save(_END_SECONDS)
    except KeyboardInterrupt:
        local.abandon()
        raise
