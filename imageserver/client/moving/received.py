# SPDX-License-Identifier: Apache-2.0
"""``download --verify``: whether FILE, read back, is what the server has.

ByChecksum   blocks are hashed as they come, then FILE's are, and the server's checksum is asked
             for: both must agree. Of an incremental download, for each span that has changed.
BySamples    where the server computes no checksums (of spans, if these are needed): pieces are
             hashed as they come and FILE is read back; what an earlier run has fetched is read
             from the server again; and so are samples of all.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol

from imageserver.client.backoff import RetryBudget, retried
from imageserver.client.failures import Different
from imageserver.client.http.answers import Abilities
from imageserver.client.http.remote import Remote
from imageserver.client.local.files import Buffer
from imageserver.client.local.formats import LocalImage, open_image
from imageserver.client.moving.blocks import Part, cores, local_part
from imageserver.client.moving.layout import Layout
from imageserver.client.moving.moved import MovedBlocks
from imageserver.client.moving.proof import Proof, recipe
from imageserver.client.moving.verify import Digests, check_zeros, compare
from imageserver.client.plan import GIB, MAX_GAP, Piece, Spans, pieces
from imageserver.client.showing.progress import Watcher, adding
from imageserver.core.checksums import Block

Cut = Callable[[Spans], Iterator[Piece]]
"""Cuts spans into the pieces that have moved."""


class Verifier(Protocol):
    """Is told by movers what comes, and checks it at the end."""

    way: ClassVar[str]
    """``verified_by`` of the result."""

    def feed(self, piece: Piece, start: int, data: Buffer) -> None:
        """Take bytes of a piece, in order."""

    def finish(self, piece: Piece) -> None:
        """Note that all of a piece has come."""

    def check(self, local: LocalImage, left: Spans, cut: Cut, watch: Watcher) -> None:
        """Read FILE back; ``left`` is what this run has fetched.

        Raises:
            Different: at the first difference.
        """


def verifier(
    remote: Remote, abilities: Abilities, layout: Layout, budget: RetryBudget, *, incremental: bool
) -> Verifier:
    """Return the best way that the server allows."""
    if abilities.has("checksum"):
        has_spans = retried(lambda: remote.has_spans(layout.size), budget)
        if has_spans or not incremental:
            where = layout.changed if incremental else None
            return ByChecksum(remote, layout, where, budget, has_spans=has_spans)
    return BySamples(remote, layout, budget, incremental=incremental)


class ByChecksum:
    """``where``: the spans that are compared; None: all of the image."""

    way: ClassVar[str] = "checksum"

    def __init__(
        self,
        remote: Remote,
        layout: Layout,
        where: Spans | None,
        budget: RetryBudget,
        *,
        has_spans: bool,
    ) -> None:
        self._remote, self._layout, self._budget = remote, layout, budget
        self._where, self._has_spans = where, has_spans
        #: Blocks of which only some comes have no digest of their own.
        self._moved = MovedBlocks(recipe(), layout.data, layout.size) if where is None else None

    def feed(self, _piece: Piece, start: int, data: Buffer) -> None:
        """Hash some bytes."""
        if self._moved:
            self._moved.feed(start, data)

    def finish(self, piece: Piece) -> None:
        """Do nothing: blocks end by themselves."""

    def check(self, local: LocalImage, _left: Spans, _cut: Cut, watch: Watcher) -> None:
        """Compare the blocks of FILE with those that came, and with the server's checksum."""
        local.sync()
        local.forget_cached()
        size, data = self._layout.size, local.spans()
        where = Spans([(0, size)]) if self._where is None else self._where
        total = sum(stop - start for span in where for start, stop in data.within(*span))
        watch.begin("verify", total)
        proof = Proof(self._remote, data, size, self._budget, has_spans=self._has_spans)
        proof.compare(where, self._part(local), local.read, adding(watch))

    def _part(self, local: LocalImage) -> Part:
        read = local_part(local.read, recipe())

        def part(block: Block) -> bytes:
            found, came = read(block), self._moved.digest(block.start) if self._moved else None
            if came not in {None, found}:
                last = block.start + block.length - 1
                raise Different(f"bytes {block.start}-{last} read back different from what came")
            return found

        return part


class OfDisk:
    """FILE is a qcow2 file that the server has made: the disk in it is what is compared."""

    way: ClassVar[str] = ByChecksum.way

    def __init__(self, remote: Remote, size: int, path: str, budget: RetryBudget) -> None:
        """``remote`` and ``size``: the image's."""
        self._remote, self._size, self._path, self._budget = remote, size, path, budget

    def feed(self, piece: Piece, start: int, data: Buffer) -> None:
        """Do nothing: these are bytes of the file."""

    def finish(self, piece: Piece) -> None:
        """Do nothing."""

    def check(self, local: LocalImage, left: Spans, cut: Cut, watch: Watcher) -> None:
        """Open FILE as qcow2, and compare the disk with the server's checksum."""
        local.sync()
        local.forget_cached()
        has_spans = retried(lambda: self._remote.has_spans(self._size), self._budget)
        all_of_it = Spans([(0, self._size)])
        layout = Layout(self._size, all_of_it, Spans(), is_mapped=False)
        by = ByChecksum(self._remote, layout, all_of_it, self._budget, has_spans=has_spans)
        disk = open_image(self._path, "qcow2", cores(), writable=False, backing=False)
        with contextlib.closing(disk):
            by.check(disk, left, cut, watch)


class BySamples:
    """Hashes pieces; reads samples, and what is older, again."""

    way: ClassVar[str] = "samples"

    def __init__(
        self, remote: Remote, layout: Layout, budget: RetryBudget, *, incremental: bool
    ) -> None:
        self._remote, self._layout, self._budget = remote, layout, budget
        self._incremental = incremental
        self._digests = Digests()

    def feed(self, piece: Piece, _start: int, data: Buffer) -> None:
        """Hash some bytes."""
        self._digests.feed(piece, data)

    def finish(self, piece: Piece) -> None:
        """Keep the piece's digest."""
        self._digests.finish(piece)

    def check(self, local: LocalImage, left: Spans, cut: Cut, watch: Watcher) -> None:
        """Compare new bytes with their hashes, earlier ones with the server's."""
        local.sync()
        local.forget_cached()
        data, zeros = self._layout.data, self._layout.zeros
        watch.begin("verify", data.total)
        told = adding(watch)
        self._digests.check(local, cut(left), told)
        # Bytes between changes are not compared: the server's may have changed since.
        earlier = pieces(data.without(left), GIB, 0 if self._incremental else MAX_GAP)
        compare(self._remote, local.read, earlier, self._budget, told)
        check_zeros(local, data, zeros if self._incremental else None)
