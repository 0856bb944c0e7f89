# SPDX-License-Identifier: Apache-2.0
"""Do both sides hold the same bytes? Hashes taken while they moved, or both read again."""

import hashlib
from collections.abc import Callable, Iterable

from imageserver.client.backoff import Patience, patiently
from imageserver.client.errors import Different
from imageserver.client.localfile import Local
from imageserver.client.plan import MIB, Piece
from imageserver.client.remote import Remote


class Digests:
    """A hash for each piece, fed in order by the one thread that has the piece."""

    def __init__(self) -> None:
        self._running: dict[int, "hashlib._Hash"] = {}  # noqa: UP037 - a stub's name
        self._digests: dict[int, bytes] = {}

    def feed(self, piece: Piece, data: bytes | memoryview) -> None:
        """Add bytes that have moved."""
        running = self._running.get(piece.start)
        if running is None:
            running = self._running[piece.start] = hashlib.sha256()
        running.update(data)

    def finish(self, piece: Piece) -> None:
        """Keep the digest only."""
        self._digests[piece.start] = self._running.pop(piece.start).digest()

    def check(self, local: Local, pieces: Iterable[Piece], told: Callable[[int], None]) -> None:
        """Read all pieces back.

        Raises:
            Different: they are not what came.
        """
        for piece in pieces:
            running = hashlib.sha256()
            for start, stop in piece.spans:
                for offset in range(start, stop, MIB):
                    data = local.read(offset, min(MIB, stop - offset))
                    running.update(data)
                    told(len(data))
            if running.digest() != self._digests[piece.start]:
                raise Different(
                    f"what was written between {piece.start} and {piece.stop} reads back different"
                )


def compare(
    remote: Remote,
    read: Callable[[int, int], bytes],
    todo: Iterable[Piece],
    patience: Patience,
    told: Callable[[int], None],
) -> None:
    """Read pieces of the image on the server and compare them with what ``read`` returns.

    Raises:
        Different: at the first MiB that differs.
    """
    for piece in todo:

        def some(piece: Piece = piece) -> None:
            for data in remote.read(piece.position, piece.stop):
                position, stop = piece.position, piece.position + len(data)
                if data != read(position, len(data)):
                    raise Different(f"both sides differ between {position} and {stop}")
                told(sum(last - first for first, last in piece.wanted(position, stop)))
                piece.position = stop
                patience.progress()

        patiently(some, patience)
