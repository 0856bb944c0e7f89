# SPDX-License-Identifier: Apache-2.0
"""From a file to a server: zeros as commands, data as ranges, by as many writers as are allowed.

    file     |DDDD.........DD.DDDDDDDD..........|
    zeros         ^^^^^^^^^          ^^^^^^^^^^^   PATCH zero, first
    data     ^^^^          ^^^^^^^^^^              PUT with Content-Range
                                                   flush

Ranges begin and end at blocks that several writers may write side by side (docs/api.md), so zeros
shorter than a block are sent as data. Each byte is written with one value only, so a request that
was given up and takes effect late, even after the end, changes nothing.
An image whose parts cannot be written (a file of imageserver) is one PUT.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import (
    Busy,
    ClientError,
    Different,
    Failed,
    Interrupted,
    LocalFailure,
    Refused,
    Transient,
)
from imageserver.client.http.answers import Abilities
from imageserver.client.http.remote import Remote
from imageserver.client.local.formats import LocalImage
from imageserver.client.local.qcow2_header import SECTOR
from imageserver.client.moving.blocks import local_part
from imageserver.client.moving.moved import MovedBlocks
from imageserver.client.moving.movers import Advance, Move, Movers
from imageserver.client.moving.proof import Proof, recipe
from imageserver.client.moving.sending import Sender, padded
from imageserver.client.moving.source import open_source
from imageserver.client.moving.verify import compare, same_length
from imageserver.client.plan import GIB, KIB, MIB, Piece, Spans, data_spans, piece_bytes, pieces
from imageserver.client.showing.progress import Watcher, adding
from imageserver.core.checksums import Block

#: Where ranges begin and end, in bytes: a qcow2 cluster, and a multiple of any block size.
_BLOCK = 64 * KIB
#: Largest piece, in bytes: it is sent again when its connection breaks.
_LARGEST = 256 * MIB
#: Largest range of one zero request, in bytes: some servers write zeros one by one.
_LARGEST_ZERO = 4 * GIB
#: How long to wait before a server is asked again for the size of an image that may be missing.
_PAD_WAITS = 0.5, 1.0
#: Added to errors after which the image may be incomplete.
_UNKNOWN = "the image on the server may be part old, part new"
_UNKNOWN_DEVICE = "if the server writes it in place (a block device), it may be part old, part new"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to upload, and how."""

    file: str
    format: str | None = None
    connections: int | None = None
    backing: bool = False
    flush: bool = True
    pad: bool = False
    verify: bool = False
    force: bool = False
    digests: bool = True
    patience_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """What was done; all in bytes but ``seconds``."""

    size: int
    data: int
    zeroed: int
    seconds: float
    flushed: bool
    verified: bool
    verified_by: str | None
    """``checksum`` (the server's) or ``reading`` (back)."""


def upload(remote: Remote, wanted: Wanted, watch: Watcher) -> Result:
    """Make the image on the server what ``wanted.file`` is.

    Raises:
        ClientError: it is not; it may be part old, part new.
    """
    return _Upload(remote, wanted, watch).run()


class _Upload:
    def __init__(self, remote: Remote, wanted: Wanted, watch: Watcher) -> None:
        self._remote, self._wanted, self._watch = remote, wanted, watch
        self._budget = RetryBudget(wanted.patience_seconds)
        self._began = time.monotonic()
        #: Whether the server may have written anything.
        self._touched = False
        #: How an interruption leaves the image.
        self._is_left = "is as it was"

    def run(self) -> Result:
        self._local = self._open()
        try:
            abilities = retried(self._remote.abilities, self._budget, Busy)
            if "PUT" not in abilities.methods or not abilities.max_writers:
                raise Refused("the image on the server is read-only")
            try:
                return self._send(abilities)
            except KeyboardInterrupt as exc:
                raise Interrupted(f"interrupted: the image on the server {self._is_left}.") from exc
        finally:
            self._local.close()

    def _open(self) -> LocalImage:
        wanted = self._wanted
        return open_source(
            wanted.file,
            wanted.format,
            wanted.connections or 4,
            backing=wanted.backing,
            force=wanted.force,
        )

    def _send(self, abilities: Abilities) -> Result:
        has_digests = self._wanted.digests and abilities.has("digest")
        self._sender = Sender(self._local, has_digests=has_digests)
        self._has_sums = self._wanted.verify and abilities.has("checksum")
        if not abilities.writes_ranges:
            size, flushed = self._put_whole()
            data, zeroed = size, 0
        else:
            size = self._fitting()
            flushed = self._wanted.flush and abilities.has("flush")
            with self._state_told(_UNKNOWN, Failed, Refused, LocalFailure, Different):
                data, zeroed = self._put_ranges(size, abilities)
                if flushed:
                    retried(self._remote.flush, self._budget)
        verified_by = None
        if self._wanted.verify:
            verified_by = self._verify(size, abilities)
            self._local.require_unchanged()
        seconds = time.monotonic() - self._began
        return Result(size, data, zeroed, seconds, flushed, self._wanted.verify, verified_by)

    @contextlib.contextmanager
    def _state_told(self, how: str, *kinds: type[ClientError]) -> Iterator[None]:
        """Add to such errors how the image may be now, if anything may have been written."""
        try:
            yield
        except kinds as exc:
            if exc.is_undone and not self._touched:
                raise  # the server has refused everything
            raise type(exc)(f"{exc}; {how}") from exc

    def _fitting(self) -> int:
        """Return the image's size, which FILE must fit into."""
        size = retried(self._remote.size, self._budget)
        room = size - self._local.size
        if room < 0 and not self._is_rounded(size):
            raise LocalFailure(
                f"{self._wanted.file} has {self._local.size} bytes, more than the image's {size}"
            )
        if room >= SECTOR and not self._wanted.pad:
            raise LocalFailure(
                f"{self._wanted.file} has {self._local.size} bytes, the image {size}: "
                "--pad makes the rest zeros"
            )
        return size

    def _is_rounded(self, size: int) -> bool:
        """Tell whether FILE is an image of this size with zeros up to the end of its last sector.

        qcow2 images have whole sectors only.
        """
        return 0 < self._local.size - size < SECTOR and not any(
            self._local.read(size, self._local.size - size)
        )

    def _put_ranges(self, size: int, abilities: Abilities) -> tuple[int, int]:
        can_zero = abilities.has("zero")
        data = self._local.spans().widened(_BLOCK, size) if can_zero else Spans([(0, size)])
        self._local.require_unchanged()  # the end of a truncated file looks like zeros
        zeros = data.gaps(size)
        many = self._remote.connections(self._wanted.connections, abilities.max_writers)
        self._is_left = "is incomplete; the same command makes it whole"
        self._watch.begin("zero", zeros.total)
        self._run(self._zero, pieces(zeros, _LARGEST_ZERO, 0), many)
        self._watch.begin("upload", data.total)
        self._hash_moved(data, size)
        largest = min(piece_bytes(data.total, many), _LARGEST)
        self._run(self._sender.move(self._remote.write), pieces(data, largest, 0), many)
        return data.total, zeros.total

    def _run(self, move: Move, todo: Iterator[Piece], many: int) -> None:
        movers = Movers(move, todo, self._budget, is_proof=False)
        try:
            movers.run(many, lambda: self._watch.moved(movers.moved), self._remote.cut)
        finally:
            self._touched |= movers.moved > 0 or self._sender.touched
        self._watch.moved(movers.moved)

    def _zero(self, piece: Piece, advance: Advance) -> None:
        try:
            self._remote.zero(piece.position, piece.stop)
        except Transient as exc:
            self._touched |= not exc.is_undone
            raise
        advance(piece.stop - piece.position)
        piece.position = piece.stop

    def _put_whole(self) -> tuple[int, bool]:
        """Replace the image in one request, which is retried as a whole.

        Return the image's size, and whether it was flushed.
        """
        size, flushed = self._local.size, False
        if self._wanted.pad or self._wanted.format == "qcow2":
            before = retried(self._size_before, self._budget)
            if self._wanted.pad:
                size = max(size, before)
            if before and self._is_rounded(before):
                size = before
        self._watch.begin("upload", size)
        self._hash_moved(Spans([(0, size)]), size)

        def put(_start: int, _stop: int, body: Iterator[bytes], sha256: bytes | None) -> None:
            nonlocal flushed
            flushed = self._remote.put(size, body, flush=self._wanted.flush, sha256=sha256)

        move = self._sender.move_at_once(put, is_hashed=self._wanted.verify)
        self._is_left = (
            "is as it was or, written in place (a block device), incomplete; "
            "the same command makes it whole"
        )
        with self._state_told(_UNKNOWN_DEVICE, Failed, LocalFailure):
            self._run(move, iter([Piece(0, 0, size)]), 1)
        self._require_size(size)
        return size, flushed

    def _size_before(self) -> int:
        """Return the image's size; 0 for a file that the upload will make.

        imageserver answers 500 for one, other servers may answer 404. If there is a larger image
        nevertheless, ``_require_size`` fails, or FILE takes its place: so with --pad the server is
        asked once more, and again, for it may have failed for a moment.
        """
        waits = iter(_PAD_WAITS if self._wanted.pad else ())
        while True:
            try:
                return self._remote.size()
            except Transient:
                raise
            except Failed:
                wait = next(waits, None)
                if wait is None:
                    return 0
                time.sleep(wait)
            except Refused:
                return 0

    def _require_size(self, sent: int) -> None:
        """Refuse a larger image: a device keeps its length, and what lies behind the upload."""
        size = retried(self._remote.size, self._budget)
        if size > sent:
            raise LocalFailure(
                f"{self._wanted.file} has {self._local.size} bytes, the image {size}: "
                "what lies behind is as it was, --pad zeroes it"
            )
        same_length(sent, size)

    def _hash_moved(self, data: Spans, size: int) -> None:
        if self._has_sums:
            self._sent, self._moved = data, MovedBlocks(recipe(), data, size)
            self._sender.note = self._moved.note

    def _verify(self, size: int, abilities: Abilities) -> str:
        """Compare the image with what was sent; return how (``Result.verified_by``)."""
        if self._has_sums:
            self._compare_checksums(size)
            return "checksum"
        self._read_back(size, abilities)
        return "reading"

    def _compare_checksums(self, size: int) -> None:
        """Compare the server's checksum with the digests of blocks, taken as they were sent."""
        has_spans = retried(lambda: self._remote.has_spans(size), self._budget)
        read = functools.partial(padded, self._local)
        again = local_part(read, recipe())

        def part(block: Block) -> bytes:
            return self._moved.digest(block.start) or again(block)

        self._watch.begin("verify", self._sent.total)
        proof = Proof(self._remote, self._sent, size, self._budget, has_spans=has_spans)
        proof.compare(Spans([(0, size)]), part, read, adding(self._watch))

    def _read_back(self, size: int, abilities: Abilities) -> None:
        """Read back what was written, and what should be zeros where the server may have data."""
        where = Spans([(0, size)])
        if abilities.has("extents"):
            where = retried(lambda: self._differing(size), self._budget)
        self._watch.begin("verify", where.total)
        read = functools.partial(padded, self._local)
        compare(self._remote, read, pieces(where, GIB), self._budget, adding(self._watch))

    def _differing(self, size: int) -> Spans:
        """Return where either side may have data: only there can both differ."""
        _, zeros, end = data_spans(self._remote.extents())
        if end != size:  # extents of something else: compare all
            return Spans([(0, size)])
        return zeros.without(self._local.spans()).gaps(size)
