# SPDX-License-Identifier: Apache-2.0
"""From a server to a file: only what is data, by several connections, resumable at any moment.

    FILE.part          what has come so far, a hole where nothing was written
    FILE.part.state    which ranges of it are on stable storage (``resume``)
    FILE               all of it: the part, renamed

With ``incremental`` into an image that exists, FILE itself is written. Then a state beside it,
FILE.incremental.state, means that it is half old, half new: only what completes it removes that.
"""

import contextlib
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imageserver.client import resume
from imageserver.client.backoff import Patience, patiently
from imageserver.client.errors import (
    Busy,
    Different,
    Interrupted,
    LocalFailure,
    Transient,
)
from imageserver.client.images import create_image, open_image
from imageserver.client.localfile import Local, claimed, local_errors, nonzero, rename_new
from imageserver.client.movers import Advance, Movers
from imageserver.client.plan import (
    GIB,
    MAX_GAP,
    Piece,
    Range,
    Spans,
    joined,
    piece_bytes,
    pieces,
)
from imageserver.client.progress import Watcher
from imageserver.client.remote import Abilities, Remote
from imageserver.client.survey import Image, survey
from imageserver.client.verify import Digests, check_zeros, compare, compare_samples, same_length

#: How often what was done is synced and noted, in seconds: what SIGKILL may cost.
_CHECKPOINT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to download, and how."""

    file: str
    format: str = "raw"
    connections: int | None = None
    incremental: bool = False
    base: str | None = None
    base_format: str | None = None
    verify: bool = False
    force: bool = False
    restart: bool = False
    patience_seconds: float = 60.0

    @property
    def in_place(self) -> bool:
        """Whether FILE exists and stays."""
        return self.incremental and self.base is None

    @property
    def kind(self) -> str:
        """What a state must agree with, beside the image."""
        if self.base:
            with local_errors(self.base):
                base = os.stat(self.base)
            path = os.path.abspath(self.base)
            return f"{self.format} overlay of {path}, {base.st_size}, {base.st_mtime_ns}"
        return f"{self.format} {'incremental' if self.incremental else 'full'}"


@dataclass(frozen=True, slots=True)
class Result:
    """What was done; all in bytes but ``seconds``."""

    size: int
    data: int
    moved: int
    resumed: int
    seconds: float
    verified: bool


def download(remote: Remote, wanted: Wanted, watch: Watcher) -> Result:
    """Make ``wanted.file`` what the server has.

    Raises:
        ClientError: it is not; what has come is kept and gone on with the next time.
    """
    return _Download(remote, wanted, watch).run()


class _Download:
    def __init__(self, remote: Remote, wanted: Wanted, watch: Watcher) -> None:
        self._remote, self._wanted, self._watch = remote, wanted, watch
        self._patience = Patience(wanted.patience_seconds)
        self._part = wanted.file if wanted.in_place else f"{wanted.file}.part"
        self._half = resume.State(_half_state(wanted.file))
        part_state = resume.State(f"{wanted.file}.part.state")
        self._state = self._half if wanted.in_place else part_state
        self._broke = False
        self._digests = Digests() if wanted.verify else None
        self._began = time.monotonic()

    def run(self) -> Result:
        self._check_file()
        abilities = patiently(self._remote.abilities, self._patience, Busy)
        self._connections = self._remote.connections(
            self._wanted.connections, abilities.max_readers
        )
        image = self._survey(abilities)
        if self._wanted.incremental and image.size and image.changed.total == image.size:
            self._watch.note("All of the image counts as changed (there may be no bitmap).")
        identity = self._identity(image)
        with claimed(self._part, is_part=not self._wanted.in_place) as require_it:
            done, local = self._open(image, identity)
            with contextlib.closing(local):
                left = image.data.without(done)
                self._move(image, identity, local, left, done)
                self._prove(abilities, image, identity, local, left)
                local.sync()
            require_it()
            self._finish()
        seconds = time.monotonic() - self._began
        total = image.data.total
        return Result(
            image.size, total, left.total, total - left.total, seconds, self._wanted.verify
        )

    def _check_file(self) -> None:
        """Refuse cheaply, before the server is asked."""
        exists = os.path.lexists(self._wanted.file)
        if self._wanted.in_place and not exists:
            raise LocalFailure(f"{self._wanted.file} is not there: download all of it first")
        if exists and not os.path.isfile(self._wanted.file):
            raise LocalFailure(f"{self._wanted.file} is no regular file")
        if exists and not self._wanted.in_place and not self._wanted.force:
            raise LocalFailure(f"{self._wanted.file} exists: --force replaces it")
        base = self._wanted.base
        if base and os.path.lexists(_half_state(base)):
            raise LocalFailure(f"{base} is half old, half new: it can be no base")

    def _identity(self, image: Image) -> resume.Identity:
        path = urllib.parse.urlsplit(self._remote.url).path
        return resume.identity(image.size, self._wanted.kind, path, image.data, image.zeros)

    def _survey(self, abilities: Abilities) -> Image:
        return survey(self._remote, abilities, self._patience, dirty=self._wanted.incremental)

    def _open(self, image: Image, identity: resume.Identity) -> tuple[list[Range], Local]:
        """Open what an earlier run has left, or begin anew; return what is done of it."""
        saved = self._state.load()
        if self._wanted.in_place:
            resume.require_whole(self._half, self._wanted.file, image.changed)
        if self._state.exists() and not self._wanted.restart:
            local, why = self._reopen(image, identity, saved)
            if local and saved:
                return saved.done, local
            self._watch.note(f"{why}: starting again.")
        if self._wanted.in_place:  # the state stays until it says what begins now
            return [], self._open_base(image)
        self._state.remove()
        return [], self._create(image)

    def _reopen(  # noqa: PLR0911 - one for each reason
        self, image: Image, identity: resume.Identity, saved: resume.Saved | None
    ) -> tuple[Local | None, str]:
        """Open what an earlier run has left if it can be gone on with, or say why not."""
        if saved is None:
            return None, f"{self._state.path} cannot be read"
        if saved.image.path != identity.path:
            return None, "The URL is not the one that was being downloaded"
        if saved.image != identity:
            return None, "The image is not the one that was being downloaded"
        left = f"{self._part} is not as it was left"
        if not os.path.getsize(self._part):
            return None, left
        with contextlib.ExitStack() as closing:
            try:
                local = closing.enter_context(contextlib.closing(self._open_part()))
            except LocalFailure:
                return None, left
            block = 1 if self._wanted.format == "raw" else 512
            if local.size != -(-image.size // block) * block:
                return None, left
            try:
                done = image.data.without(image.data.without(saved.done))
                compare_samples(self._remote, local.read, done, self._patience)
            except Different:
                return None, f"{self._part} is not what the server has now"
            if not image.is_mapped:  # zeros will not be written: let there be none
                for start, stop in Spans(saved.done).gaps(image.size):
                    local.zero(start, stop)
            closing.pop_all()
            return local, ""

    def _open_part(self) -> Local:
        return open_image(self._part, self._wanted.format, self._connections, writable=True)

    def _open_base(self, image: Image) -> Local:
        local = self._open_part()
        if local.size != image.size:
            local.close()
            raise LocalFailure(
                f"{self._part} has {local.size} bytes, the image {image.size}: "
                "it is no earlier state of it"
            )
        return local

    def _create(self, image: Image) -> Local:
        wanted = self._wanted
        base = (wanted.base, wanted.base_format) if wanted.base else None
        return create_image(self._part, wanted.format, image.size, self._connections, base)

    def _move(
        self,
        image: Image,
        identity: resume.Identity,
        local: Local,
        left: Spans,
        before: list[Range],
    ) -> None:
        """Fetch what is left, and keep the state up to date until the very end."""
        self._watch.begin("download", image.data.total, image.data.total - left.total)
        undone = image.changed if self._wanted.in_place else Spans()
        self._state.save(identity, before, undone.without(before))
        for start, stop in image.zeros:
            local.zero(start, stop)
        movers = Movers(
            self._mover(image, local), self._pieces(left), self._patience, is_proof=True
        )
        saved = time.monotonic()

        def save() -> None:
            nonlocal saved
            done = joined([*before, *movers.done()])
            local.sync()
            self._state.save(identity, done, undone.without(done))
            saved = time.monotonic()

        def tick() -> None:
            self._watch.moved(movers.moved)
            if time.monotonic() - saved >= _CHECKPOINT_SECONDS:
                save()

        try:
            movers.run(self._connections, tick, self._remote.cut)
            save()
        except KeyboardInterrupt as exc:
            save()
            raise Interrupted(
                f"interrupted: the same command goes on with {self._part} where it stopped."
            ) from exc
        except BaseException:
            with contextlib.suppress(LocalFailure):
                save()
            raise

    def _pieces(self, left: Spans) -> Iterator[Piece]:
        return pieces(left, piece_bytes(left.total, self._connections), MAX_GAP)

    def _mover(self, image: Image, local: Local) -> Callable[[Piece, Advance], None]:
        def move(piece: Piece, advance: Advance) -> None:
            try:
                for data in self._remote.read(piece.position, piece.stop):
                    position = piece.position
                    count = self._write(image, local, piece, data)
                    piece.position = position + len(data)
                    advance(count)
            except Transient:
                self._broke = True
                raise
            if self._digests:
                self._digests.finish(piece)

        return move

    def _write(self, image: Image, local: Local, piece: Piece, data: bytes | bytearray) -> int:
        """Write what is wanted of ``data``, which lies at the piece's position."""
        position = piece.position
        if not image.is_mapped:
            for first, last in nonzero(data):
                local.write(position + first, memoryview(data)[first:last])
            if self._digests:
                self._digests.feed(piece, data)
            return len(data)
        count = 0
        for start, stop in piece.wanted(position, position + len(data)):
            whole = stop - start == len(data)
            part = data if whole else data[start - position : stop - position]
            local.write(start, part)
            if self._digests:
                self._digests.feed(piece, part)
            count += len(part)
        return count

    def _prove(
        self,
        abilities: Abilities,
        image: Image,
        identity: resume.Identity,
        local: Local,
        left: Spans,
    ) -> None:
        """Look whether it is still the image that was asked about, and with --verify at FILE."""
        now = self._survey(abilities)
        try:
            same_length(image.size, now.size)
            if self._digests or self._broke or self._identity(now) != identity:
                compare_samples(self._remote, local.read, now.data, self._patience)
            if self._digests:
                self._check(local, image.data, left)
                changed_only = self._wanted.incremental
                check_zeros(local, image.data, image.zeros if changed_only else None)
        except Different as exc:
            if self._wanted.in_place:
                self._state.save(identity, [], image.changed)
            else:
                self._state.remove()
            raise Different(f"{exc}; the next run fetches all again") from exc

    def _check(self, local: Local, data: Spans, left: Spans) -> None:
        """Read FILE back: against the hashes, and against the server what came earlier."""
        assert self._digests  # noqa: S101 - for the types
        local.sync()
        local.forget_cached()
        self._watch.begin("verify", data.total)
        count = 0

        def told(more: int) -> None:
            nonlocal count
            count += more
            self._watch.moved(count)

        self._digests.check(local, self._pieces(left), told)
        # What lies between changes is not asked about: it may have changed since.
        earlier = pieces(data.without(left), GIB, 0 if self._wanted.incremental else MAX_GAP)
        compare(self._remote, local.read, earlier, self._patience, told)

    def _finish(self) -> None:
        """Put the part in FILE's place, for good."""
        with local_errors(self._wanted.file):
            if not self._wanted.in_place and self._wanted.force:
                os.replace(self._part, self._wanted.file)
            elif not self._wanted.in_place:
                rename_new(self._part, self._wanted.file)
            resume.sync_folder(self._wanted.file)
        self._state.remove()
        self._half.remove()


def _half_state(path: str) -> str:
    return f"{path}.incremental.state"
