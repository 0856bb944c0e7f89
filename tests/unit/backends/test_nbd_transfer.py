# SPDX-License-Identifier: Apache-2.0
"""Reads and writes through a ring, over a fake link: the right bytes, or the right error."""

import random
import select
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from imageserver.backends.nbd import transfer
from imageserver.core.errors import BackendError, ClientGone, NoSpace, ShortBody
from imageserver.core.sources import HasFileno
from tests.unit.backends.links import KIB, FakeLink, at

SIZE = 64 * KIB - 100  # no multiple of any block
CONTENT = random.Random(7).randbytes(SIZE)  # noqa: S311 - no secret

#: Within a block, a block, over edges, to the end; short transfers and long ones.
SPANS = [
    (0, 1),
    (4095, 2),
    (0, 4 * KIB),
    (100, 5000),
    (4 * KIB, 8 * KIB),
    (5000, 30_000),
    (SIZE - 1, 1),
    (SIZE - 5000, 5000),
    (0, SIZE),
]
#: Bytes of transfers that are done on the spot, and on a thread.
LENGTHS = pytest.mark.parametrize("length", [8 * KIB, 40 * KIB], ids=["short", "long"])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [each for each in threading.enumerate() if each.name == "image"] == []


def _fake(**parts: object) -> FakeLink:
    return FakeLink(bytearray(CONTENT), **parts)  # type: ignore[arg-type]


@dataclass
class _Source:
    """A client's body that comes in pieces, and ends early or fails where it is told to."""

    data: bytes
    piece: int = 1 << 20
    error: BaseException | None = None
    #: Say nothing when all has been sent, until the other side has given up.
    stalls: bool = False
    done: int = 0

    def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        count = min(len(buffer), self.piece, len(self.data) - self.done)
        buffer[:count] = self.data[self.done : self.done + count]
        self.done += count
        if count == 0 and self.error:
            raise self.error
        if count == 0 and self.stalls:
            assert until is not None
            assert select.select([until], [], [], 10)[0]
        return count


# Reading


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize(("align", "chunk"), [(1, 4096), (512, 4096), (4096, 8192)], ids=str)
def test_a_read_has_the_bytes_of_its_range(span: tuple[int, int], align: int, chunk: int) -> None:
    fake, (start, length) = _fake(align=align, chunk=chunk), span

    pieces = [bytes(piece) for piece in transfer.read(fake.link, start, length)]

    assert b"".join(pieces) == CONTENT[start : start + length]
    assert all(length <= chunk for _, length in fake.sent("read"))
    assert fake.most_in_flight <= fake.depth


@pytest.mark.parametrize("span", [(0, 8192), (100, 8000), (3, 1), (4095, 2), (SIZE - 1000, 1000)])
@pytest.mark.parametrize("align", [1, 512])
def test_what_one_buffer_holds_is_moved_in_parts_that_are_under_way_together(
    monkeypatch: pytest.MonkeyPatch, span: tuple[int, int], align: int
) -> None:
    monkeypatch.setattr(transfer, "_STEP", 2048)
    monkeypatch.setattr(transfer, "_UNIT", 1024)
    fake, (start, length) = _fake(align=align, chunk=8192, depth=3), span
    body = random.Random(8).randbytes(length)  # noqa: S311 - no secret

    read = [bytes(piece) for piece in transfer.read(fake.link, start, length)]
    reads, fake.requests[:] = fake.sent("read"), []
    written = list(transfer.write(fake.link, start, length, _Source(body, piece=999)))

    assert b"".join(read) == CONTENT[start : start + length]
    assert bytes(fake.content) == CONTENT[:start] + body + CONTENT[start + length :]
    assert (written[-1], fake.settled) == (length, True)
    assert len(reads) == len(fake.sent("write")) == -(-length // 3072)
    assert fake.most_in_flight == max(1, len(reads))


@pytest.mark.parametrize("span", [(0, 8192), (100, 8000), (4095, 2)])
def test_beside_other_requests_what_one_buffer_holds_is_one_request(
    monkeypatch: pytest.MonkeyPatch, span: tuple[int, int]
) -> None:
    monkeypatch.setattr(transfer, "_STEP", 2048)
    monkeypatch.setattr(transfer, "_UNIT", 1024)
    fake, (start, length) = _fake(chunk=8192, is_alone=False), span
    body = random.Random(8).randbytes(length)  # noqa: S311 - no secret

    read = b"".join(map(bytes, transfer.read(fake.link, start, length)))
    list(transfer.write(fake.link, start, length, _Source(body)))

    assert read == CONTENT[start : start + length]
    assert bytes(fake.content) == CONTENT[:start] + body + CONTENT[start + length :]
    assert fake.sent("read") == fake.sent("write") == [span]


@pytest.mark.parametrize(
    ("is_alone", "most", "threads"),
    [
        pytest.param(True, SIZE, True, id="alone"),
        pytest.param(False, SIZE, False, id="beside-others"),
        pytest.param(False, SIZE - 1, True, id="too-long"),
    ],
)
def test_beside_other_requests_a_read_of_some_buffers_starts_no_thread(
    monkeypatch: pytest.MonkeyPatch, is_alone: bool, most: int, threads: bool
) -> None:
    monkeypatch.setattr(transfer, "_THREADED", most)
    started: list[object] = []
    side = transfer.Side
    monkeypatch.setattr(transfer, "Side", lambda *a, **k: started.append(a) or side(*a, **k))
    fake = _fake(is_alone=is_alone)

    read = b"".join(map(bytes, transfer.read(fake.link, 0, SIZE)))

    assert read == CONTENT
    assert bool(started) is threads
    assert fake.most_in_flight == fake.depth


def test_a_long_read_keeps_as_many_requests_in_flight_as_it_may() -> None:
    fake = _fake(depth=4)
    for _ in transfer.read(fake.link, 0, SIZE):
        pass
    assert fake.most_in_flight == 4


def test_nothing_is_read_of_nothing() -> None:
    fake = _fake()
    assert list(transfer.read(fake.link, 5, 0)) == []
    assert fake.requests == []


@LENGTHS
def test_a_read_that_fails_ends_after_what_came_before(length: int) -> None:
    fake = _fake(fail=lambda r: BackendError("as told") if at("read", 4 * KIB)(r) else None)
    got: list[bytes] = []

    with pytest.raises(BackendError, match="as told"):
        got.extend(map(bytes, transfer.read(fake.link, 0, length)))

    assert b"".join(got) == CONTENT[: 4 * KIB]


@LENGTHS
def test_a_reader_that_gives_up_stops_what_is_read_ahead(length: int) -> None:
    fake = _fake()
    reading = transfer.read(fake.link, 0, length)
    next(reading)

    reading.close()

    assert len(fake.requests) <= fake.depth + 1
    assert fake.stop_asked.is_set() is (length > 8 * KIB)


def test_a_reader_that_gives_up_does_not_wait_for_a_silent_server() -> None:
    fake = _fake(hangs=at("read", 4 * KIB))
    reading = transfer.read(fake.link, 0, SIZE)
    next(reading)

    reading.close()

    assert fake.stop_asked.is_set()


# Writing


@pytest.mark.parametrize("span", SPANS, ids=str)
@pytest.mark.parametrize("piece", [1 << 20, 777], ids=["at-once", "in-pieces"])
@pytest.mark.parametrize(("align", "chunk"), [(1, 4096), (512, 4096), (4096, 8192)], ids=str)
def test_a_write_changes_its_range_and_nothing_else(
    span: tuple[int, int], piece: int, align: int, chunk: int
) -> None:
    fake, (start, length) = _fake(align=align, chunk=chunk), span
    data = bytes(reversed(CONTENT))[:length]

    totals = list(transfer.write(fake.link, start, length, _Source(data, piece)))

    assert fake.content == CONTENT[:start] + data + CONTENT[start + length :]
    assert totals == sorted(set(totals))
    assert totals[-1] == length
    assert (fake.settled, fake.settles) == (True, 0)
    assert fake.most_in_flight <= fake.depth


def test_only_blocks_that_are_covered_in_part_are_read() -> None:
    fake = _fake(align=512)
    list(transfer.write(fake.link, 1000, 5000, _Source(bytes(5000))))
    assert fake.sent("read") == [(512, 512), (5632, 512)]


def test_edges_are_put_around_what_has_come_and_not_before() -> None:
    seen = []

    class Source(_Source):
        def readinto(self, buffer: memoryview, until: HasFileno | None = None) -> int:
            assert isinstance(buffer.obj, bytearray)
            seen.append(bytes(buffer.obj[:488]))  # what lies before byte 1000 of the image
            return super().readinto(buffer, until)

    # A source may still be looking at what a buffer held before.
    fake = _fake(align=512)
    list(transfer.write(fake.link, 1000, 1000, Source(bytes(1000))))
    assert seen[0] == bytes(488)
    assert fake.content[512:1000] == CONTENT[512:1000]


def test_both_edges_in_one_block_are_read_once() -> None:
    fake = _fake(align=512)
    list(transfer.write(fake.link, 520, 10, _Source(bytes(10))))
    assert fake.sent("read") == [(512, 512)]


def test_nothing_is_written_of_nothing() -> None:
    fake = _fake()
    assert list(transfer.write(fake.link, 4096, 0, _Source(b"x"))) == []
    assert fake.requests == []


@LENGTHS
@pytest.mark.parametrize("arrived", [0, 1, 4 * KIB, 5000])
def test_a_body_that_ends_early_says_how_much_came_and_leaves_no_write_in_flight(
    length: int, arrived: int
) -> None:
    fake = _fake()

    with pytest.raises(ShortBody, match=f" {arrived} bytes"):
        list(transfer.write(fake.link, 100, length, _Source(bytes(arrived))))

    assert fake.settled


@LENGTHS
def test_a_client_that_goes_away_leaves_no_write_in_flight(length: int) -> None:
    fake = _fake()

    with pytest.raises(ClientGone):
        list(transfer.write(fake.link, 0, length, _Source(bytes(5000), error=ClientGone())))

    assert (fake.settled, fake.settles) == (True, int(bool(fake.sent("write"))))


@LENGTHS
@pytest.mark.parametrize("start", [0, 4 * KIB], ids=["at-once", "later"])
def test_a_write_that_fails_is_an_error(length: int, start: int) -> None:
    fake = _fake(fail=lambda r: NoSpace("full") if at("write", start)(r) else None)
    source = _Source(bytes(length))

    with pytest.raises(NoSpace):
        list(transfer.write(fake.link, 0, length, source))

    assert fake.settles == 1
    assert source.done <= (fake.depth + 2) * fake.chunk


def test_a_write_that_fails_does_not_wait_for_a_client_that_stalls() -> None:
    fake = _fake(fail=lambda r: NoSpace("full") if at("write", 0)(r) else None)

    with pytest.raises(NoSpace):
        list(transfer.write(fake.link, 0, SIZE, _Source(bytes(5000), stalls=True)))

    assert fake.settles == 1


@LENGTHS
def test_an_edge_that_cannot_be_read_is_an_error_and_nothing_is_written(length: int) -> None:
    fake = _fake(align=512, fail=lambda _: BackendError("as told"))

    with pytest.raises(BackendError, match="as told"):
        list(transfer.write(fake.link, 1, length, _Source(bytes(length))))

    assert (fake.sent("write"), fake.settled) == ([], True)


def test_a_writer_that_is_dropped_waits_for_no_silent_server() -> None:
    fake = _fake(hangs=at("write", 8 * KIB))
    writing = transfer.write(fake.link, 0, SIZE, _Source(bytes(SIZE)))
    next(writing)

    writing.close()

    assert fake.stop_asked.is_set()
    assert fake.settled
