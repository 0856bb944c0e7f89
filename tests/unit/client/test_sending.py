# SPDX-License-Identifier: Apache-2.0
"""Pieces as bodies of requests: with their digests, and once more where they arrive damaged."""

import hashlib
from collections.abc import Iterator

import pytest

from imageserver.client.failures import Broken, Busy, Different, GaveUp, LocalFailure, Mismatch
from imageserver.client.moving.sending import Sender
from imageserver.client.plan import KIB, MIB, Piece

DATA = bytes(range(256)) * (4 * KIB)  # 1 MiB


class _Local:
    """A ``LocalImage`` in memory."""

    data = DATA
    size = len(DATA) - 1000
    reads = 0
    changes_after = 1 << 30

    def read(self, start: int, length: int) -> bytes:
        self.reads += 1
        return self.data[: self.size][start : start + length]

    def require_unchanged(self) -> None:
        if self.reads > self.changes_after:
            raise LocalFailure("has changed")


class _Server:
    """Takes bodies, and answers each with what comes next."""

    def __init__(self, *answers: Exception | None) -> None:
        self.answers = list(answers)
        self.came: list[tuple[int, int, bytes, bytes | None]] = []

    def send(self, start: int, stop: int, body: Iterator[bytes], sha256: bytes | None) -> None:
        answer = self.answers.pop(0)
        if isinstance(answer, Busy) and answer.is_undone:
            raise answer
        self.came.append((start, stop, b"".join(body), sha256))
        if answer:
            raise answer


def _moved(server: _Server, *, has_digests: bool, local: _Local | None = None) -> tuple[int, bool]:
    """Move a piece; return how many bytes were counted, and whether any may have been written."""
    sender = Sender(local or _Local(), has_digests=has_digests)  # type: ignore[arg-type]
    counted: list[int] = []
    piece = Piece(1000, 1000, len(DATA))
    try:
        sender.move(server.send)(piece, counted.append)
    finally:
        moved = sum(counted), sender.touched
    assert piece.position == piece.stop
    return moved


SENT = DATA[1000:-1000] + bytes(1000)
DIGEST = hashlib.sha256(SENT).digest()
DAMAGED = Mismatch("it says 400: body does not match its Content-Digest", 400)


@pytest.mark.parametrize("has_digests", [False, True])
def test_a_piece_is_sent_with_its_digest_where_that_is_verified(has_digests: bool) -> None:
    server = _Server(None)

    assert _moved(server, has_digests=has_digests) == (len(SENT), False)
    assert server.came == [(1000, len(DATA), SENT, DIGEST if has_digests else None)]


def test_what_arrives_damaged_is_sent_once_more_and_counted_once() -> None:
    server = _Server(DAMAGED, None)

    assert _moved(server, has_digests=True) == (len(SENT), True)
    assert [came[2] for came in server.came] == [SENT, SENT]


def test_what_arrives_damaged_twice_is_an_error_that_names_the_range() -> None:
    server = _Server(DAMAGED, DAMAGED, None)

    told = "bytes 1000-1048575 arrived damaged, twice: it says 400"
    with pytest.raises(Different, match=told):
        _moved(server, has_digests=True)
    assert len(server.came) == 2


@pytest.mark.parametrize(
    ("error", "touched"), [(Busy("busy"), False), (GaveUp("504"), True), (Broken("cut"), True)]
)
def test_what_can_be_retried_later_is_left_to_others(error: Exception, touched: bool) -> None:
    sender = Sender(_Local(), has_digests=True)  # type: ignore[arg-type]
    counted: list[int] = []

    with pytest.raises(type(error)):
        sender.move(_Server(error).send)(Piece(0, 0, 1000), counted.append)
    assert (sum(counted), sender.touched) == (0, touched)


def test_a_file_that_changes_after_its_digest_was_made_is_not_sent() -> None:
    local = _Local()
    local.changes_after = 4
    sender = Sender(local, has_digests=True)  # type: ignore[arg-type]

    with pytest.raises(LocalFailure):
        sender.move_at_once(_Server(None).send, is_hashed=True)(
            Piece(0, 0, MIB), lambda _count: None
        )


def _large() -> tuple[_Local, Sender, list[tuple[int, int, bytes | None]]]:
    """A file of several blocks, what sends it, and what is noted: start, length, digest."""
    local = _Local()
    local.data = DATA * 10
    local.size = len(local.data) - 1000
    sender = Sender(local, has_digests=True)  # type: ignore[arg-type]
    noted: list[tuple[int, int, bytes | None]] = []
    sender.note = lambda start, data, sha256: noted.append((start, sum(map(len, data)), sha256))
    return local, sender, noted


BLOCKS = [(MIB, 4 * MIB), (4 * MIB, 8 * MIB), (8 * MIB, 9 * MIB)]


def test_each_block_of_a_piece_is_sent_with_its_digest_and_noted_when_it_is_there() -> None:
    local, sender, noted = _large()
    server = _Server(None, DAMAGED, None, None)
    sender.move(server.send)(Piece(MIB, MIB, 9 * MIB), lambda _count: None)

    wanted = [(*span, local.data[slice(*span)]) for span in BLOCKS]
    hashed = [(*each, hashlib.sha256(each[2]).digest()) for each in wanted]
    assert server.came == [hashed[0], hashed[1], hashed[1], hashed[2]]
    assert noted == [(start, stop - start, sha256) for start, stop, _, sha256 in hashed]


def test_what_fails_in_a_block_begins_with_that_block_again() -> None:
    _, sender, noted = _large()
    piece = Piece(MIB, MIB, 9 * MIB)
    with pytest.raises(Broken):
        sender.move(_Server(None, Broken("cut")).send)(piece, lambda _count: None)
    assert (piece.position, [start for start, _, _ in noted]) == (4 * MIB, [MIB])

    server = _Server(None, None)
    sender.move(server.send)(piece, lambda _count: None)
    assert [came[:2] for came in server.came] == BLOCKS[1:]
