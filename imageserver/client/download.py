# SPDX-License-Identifier: Apache-2.0
"""From a server to a file: only what is data, by several connections, resumable at any moment.

    FILE.part          what has come so far, a hole where nothing was written
    FILE.part.state    which ranges of it are on stable storage (``resume``)
    FILE               all of it: the part, renamed

With ``incremental`` into an image that exists, FILE itself is written, and a state beside it
means that it is half old, half new.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from imageserver.client import resume
from imageserver.client.backoff import Patience, patiently
from imageserver.client.errors import Busy, Interrupted, LocalFailure, Refused
from imageserver.client.localfile import Local, RawFile, local_errors, nonzero
from imageserver.client.movers import Advance, Movers
from imageserver.client.plan import (
    GIB,
    MAX_GAP,
    Piece,
    Range,
    Spans,
    data_spans,
    joined,
    piece_bytes,
    pieces,
)
from imageserver.client.progress import Watcher
from imageserver.client.qcow2 import Qcow2, checked_base
from imageserver.client.remote import Abilities, Remote
from imageserver.client.verify import Digests, compare

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
        how = "overlay" if self.base else "incremental" if self.incremental else "full"
        return f"{self.format} {how}"


@dataclass(frozen=True, slots=True)
class Result:
    """What was done; all in bytes but ``seconds``."""

    size: int
    data: int
    moved: int
    resumed: int
    seconds: float
    verified: bool


@dataclass(frozen=True, slots=True)
class _Image:
    """What the server says of the image; ``is_mapped``: where its data is."""

    size: int
    data: Spans
    zeros: Spans
    is_mapped: bool


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
        self._state = resume.State(f"{wanted.file}.part.state")
        self._digests = Digests() if wanted.verify else None
        self._began = time.monotonic()

    def run(self) -> Result:
        self._check_file()
        abilities = patiently(self._remote.abilities, self._patience, Busy)
        self._connections = connections(self._wanted.connections, abilities.max_readers)
        image = self._survey(abilities)
        identity = resume.identity(image.size, self._wanted.kind, image.data, image.zeros)
        with contextlib.ExitStack() as closing:
            closing.enter_context(_claimed(self._part))
            done, local = self._open(image, identity)
            closing.callback(local.close)
            left = image.data.without(done)
            self._move(image, identity, local, left, done)
            if self._digests:
                self._check(local, image.data, left)
            local.sync()
            closing.pop_all().close()
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

    def _survey(self, abilities: Abilities) -> _Image:
        size = patiently(self._remote.size, self._patience)
        if not size:  # oVirt's daemon has no good answer about its extents
            return _Image(0, Spans(), Spans(), is_mapped=True)
        if not abilities.has("extents"):
            if self._wanted.incremental:
                raise Refused("the server does not tell what has changed: no incremental download")
            return _Image(size, Spans([(0, size)]), Spans(), is_mapped=False)
        dirty = self._wanted.incremental
        context = "dirty" if dirty else "zero"
        data, zeros = patiently(
            lambda: data_spans(self._remote.extents(context), dirty=dirty), self._patience
        )
        if not dirty:
            # One extent of data may also be said of an image that the server cannot look into.
            return _Image(size, data, Spans(), is_mapped=data.total < size)
        if data.total + zeros.total == size:
            self._watch.note("All of the image counts as changed (there may be no bitmap).")
        return _Image(size, data, zeros, is_mapped=True)

    def _open(self, image: _Image, identity: resume.Identity) -> tuple[list[Range], Local]:
        """Open what an earlier run has left, or begin anew; return what is done of it."""
        known = None if self._wanted.restart else self._state.load(identity)
        if known is not None and os.path.getsize(self._part):
            local = self._open_part()
            if local.size >= image.size:
                if not image.is_mapped:  # zeros will not be written: let there be none
                    for start, stop in Spans(known).gaps(image.size):
                        local.zero(start, stop)
                return known, local
            local.close()
        if self._state.exists() and not self._wanted.restart:
            self._watch.note("The image is not the one that was being downloaded: starting again.")
        self._state.remove()
        if self._wanted.in_place:
            return [], self._open_base(image)
        return [], self._create(image)

    def _open_part(self) -> Local:
        if self._wanted.format == "raw":
            return RawFile.open(self._part, writable=True)
        return Qcow2(self._part, self._connections, writable=True)

    def _open_base(self, image: _Image) -> Local:
        local = self._open_part()
        if local.size != image.size:
            local.close()
            raise LocalFailure(
                f"{self._part} has {local.size} bytes, the image {image.size}: "
                "it is no earlier state of it"
            )
        return local

    def _create(self, image: _Image) -> Local:
        if self._wanted.format == "raw":
            return RawFile.create(self._part, image.size)
        given, kind = self._wanted.base, self._wanted.base_format
        base = checked_base(given, kind, image.size) if given else None
        return Qcow2.create(self._part, image.size, self._connections, base)

    def _move(
        self,
        image: _Image,
        identity: resume.Identity,
        local: Local,
        left: Spans,
        before: list[Range],
    ) -> None:
        """Fetch what is left, and keep the state up to date until the very end."""
        self._watch.begin("download", image.data.total, image.data.total - left.total)
        self._state.save(identity, before)
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
            self._state.save(identity, done)
            saved = time.monotonic()

        def tick() -> None:
            self._watch.moved(movers.moved)
            if time.monotonic() - saved >= _CHECKPOINT_SECONDS:
                save()

        try:
            movers.run(self._connections, tick, self._remote.cut)
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

    def _mover(self, image: _Image, local: Local) -> Callable[[Piece, Advance], None]:
        def move(piece: Piece, advance: Advance) -> None:
            for data in self._remote.read(piece.position, piece.stop):
                position = piece.position
                count = self._write(image, local, piece, data)
                piece.position = position + len(data)
                advance(count)
            if self._digests:
                self._digests.finish(piece)

        return move

    def _write(self, image: _Image, local: Local, piece: Piece, data: bytes) -> int:
        """Write what is wanted of ``data``, which lies at the piece's position."""
        position = piece.position
        if not image.is_mapped:
            for first, last in nonzero(data):
                local.write(position + first, data[first:last])
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
            if not self._wanted.in_place:
                os.replace(self._part, self._wanted.file)
            folder = os.open(os.path.dirname(self._wanted.file) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._state.remove()


def connections(asked: int | None, most: int) -> int:
    """Return how many connections to use: as asked, 4 by default, as far as the server allows."""
    return max(1, min(asked or 4, most))


@contextlib.contextmanager
def _claimed(path: str) -> Iterator[None]:
    """Keep a second download of the same file out."""
    with local_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise LocalFailure(f"{path}: another download of this file is running") from exc
        yield
    finally:
        os.close(fd)
