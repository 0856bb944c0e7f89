# SPDX-License-Identifier: Apache-2.0
"""A local image's pieces as bodies of requests, with their digests where the server verifies them.

    without digests    a piece is one request, read as it is sent
    with digests       one request for each block of 4 MiB, which is read and hashed while the one
                       before it is sent: a digest goes before its body
    in one request     (a file on the server) read twice, the second time from the page cache

A block that is sent with its digest needs no other for ``--verify``.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from imageserver.client.failures import Different, Mismatch, Transient
from imageserver.client.local.formats import LocalImage
from imageserver.client.moving.movers import Advance, Move
from imageserver.client.plan import KIB, MIB, Piece, Range

#: Bytes that are read and sent at once: they stay in the processor's cache (1 GiB in 0.67 s,
#: by MiB in 0.83 s).
_SENT_BYTES = 256 * KIB
#: Bytes with a digest of their own, from a multiple of it on: the block of a checksum.
_BLOCK = 4 * MIB

#: Sends a span whose bytes are these, with their SHA-256 where that is to be verified.
Send = Callable[[int, int, Iterator[bytes], bytes | None], object]
#: Is called with what has been sent, where it begins, and its SHA-256 where that was made.
Note = Callable[[int, Iterable[bytes], bytes | None], None]


@dataclass(frozen=True, slots=True)
class _Held:
    """A span's bytes in memory."""

    start: int
    stop: int
    pieces: list[bytes]
    sha256: bytes


class Sender:
    """Sends pieces; several threads may at once."""

    def __init__(self, local: LocalImage, *, has_digests: bool) -> None:
        self._local = local
        self._has_digests = has_digests
        self.note: Note = lambda _start, _pieces, _sha256: None
        #: Whether the server may have written some of a piece that failed.
        self.touched = False

    def move(self, send: Send) -> Move:
        """Return a ``Move`` that sends a piece, and counts its bytes.

        What arrives as something else is sent once more.
        """

        def move(piece: Piece, advance: Advance) -> None:
            if self._has_digests:
                self._send_blocks(send, piece, advance)
                return
            start, stop = span = piece.position, piece.stop
            self._send(send, span, self._noted(start, self._read(span)), None, advance)
            piece.position = stop

        return move

    def move_at_once(self, send: Send, *, is_hashed: bool) -> Move:
        """Return a ``Move`` that sends a piece in one request, and counts its bytes.

        ``is_hashed``: with its digest, if the server verifies it, for which it is read twice.
        """

        def move(piece: Piece, advance: Advance) -> None:
            span = piece.start, piece.stop

            def tried() -> None:
                is_verified = is_hashed and self._has_digests
                sha256 = self._sha256(span, advance) if is_verified else None
                body = self._noted(piece.start, self._read(span))
                self._send(send, span, body, sha256, advance)

            _twice(tried, span)
            piece.position = piece.stop

        return move

    def _send_blocks(self, send: Send, piece: Piece, advance: Advance) -> None:
        """Send the blocks of a piece; the position is behind the last one that is there."""
        spans = iter(list(_blocks(piece.position, piece.stop)))
        with ThreadPoolExecutor(1, "digest") as pool:
            ahead = pool.submit(self._hold, next(spans))
            for span in (*spans, None):
                held = ahead.result()
                if span:
                    ahead = pool.submit(self._hold, span)
                send_held = functools.partial(self._send_held, send, held, advance)
                _twice(send_held, (held.start, held.stop))
                self.note(held.start, held.pieces, held.sha256)
                piece.position = held.stop

    def _hold(self, span: Range) -> _Held:
        made, pieces = hashlib.sha256(), []
        for data in self._read(span):
            made.update(data)
            pieces.append(data)
        return _Held(*span, pieces, made.digest())

    def _send_held(self, send: Send, held: _Held, advance: Advance) -> None:
        self._send(send, (held.start, held.stop), iter(held.pieces), held.sha256, advance)

    def _send(
        self,
        send: Send,
        span: Range,
        pieces: Iterator[bytes],
        sha256: bytes | None,
        advance: Advance,
    ) -> None:
        count = 0

        def body() -> Iterator[bytes]:
            nonlocal count
            for data in pieces:
                yield data
                count += len(data)
                advance(len(data))

        try:
            send(*span, body(), sha256)
        except (Transient, Mismatch) as exc:
            advance(-count)
            self.touched |= count > 0 and not exc.is_undone
            raise

    def _sha256(self, span: Range, advance: Advance) -> bytes:
        made = hashlib.sha256()
        for data in self._read(span):
            made.update(data)
            advance(0)  # which ends this thread if it has to
        return made.digest()

    def _noted(self, start: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for data in pieces:
            yield data
            self.note(start, [data], None)
            start += len(data)

    def _read(self, span: Range) -> Iterator[bytes]:
        start, stop = span
        for offset in range(start, stop, _SENT_BYTES):
            data = padded(self._local, offset, min(_SENT_BYTES, stop - offset))
            self._local.require_unchanged()
            yield data


def _blocks(start: int, stop: int) -> Iterator[Range]:
    while start < stop:
        end = min(start - start % _BLOCK + _BLOCK, stop)
        yield start, end
        start = end


def _twice(action: Callable[[], None], span: Range) -> None:
    """Do something again if other bytes have arrived.

    Raises:
        Different: they have once more.
    """
    try:
        action()
    except Mismatch:
        try:
            action()
        except Mismatch as exc:
            raise Different(f"bytes {span[0]}-{span[1] - 1} arrived damaged, twice: {exc}") from exc


def padded(local: LocalImage, start: int, length: int) -> bytes:
    """Read from the file; behind its end return zeros."""
    inside = max(0, min(length, local.size - start))
    data = local.read(start, inside) if inside else b""
    return data if inside == length else data + bytes(length - inside)
