# SPDX-License-Identifier: Apache-2.0
"""Operations over a fake back end: bytes moved, progress shown, rights given back in time."""

from collections.abc import Callable, Generator, Iterator

import pytest

from imageserver.core.errors import BackendError, BadRequest, ClientGone, MethodNotAllowed
from imageserver.core.kinds import ImageInfo
from imageserver.core.ranges import Span, whole
from imageserver.images import operations, sessions
from imageserver.images.sessions import Need, Session
from tests.unit.fakes import TRANSFER, Bytes, World, a_request


def _open(world: World, need: Need = sessions.READ) -> Session:
    session = world.sessions().open(TRANSFER, need, a_request())
    world.journal.clear()
    return session


def _states(world: World, pieces: Iterator[object]) -> list[bool]:
    """Take every piece; tell for each whether the image had been given back when it came."""
    return [world.opened[-1].closed for _ in pieces]


class _Gone:
    def readinto(self, buffer: memoryview, _until: object = None) -> int:
        raise ClientGone

    def verify(self, written: int = 0) -> None: ...


def test_reading_yields_the_span_and_shows_progress() -> None:
    world = World()

    pieces = [bytes(piece) for piece in operations.read(_open(world), Span(1, 10, 10))]

    assert (pieces, world.progress) == ([b"1234", b"5678", b"9"], [(0, 9), (4, 9), (8, 9), (9, 9)])


def test_reading_gives_the_image_back_before_the_last_piece() -> None:
    world = World()

    assert _states(world, operations.read(_open(world), whole(10))) == [False, False, True]
    assert world.journal == ["close", "free"]


def test_a_read_of_one_piece_comes_with_the_image_given_back() -> None:
    world = World(piece=10)

    assert _states(world, operations.read(_open(world), whole(10))) == [True]


def test_an_empty_read_yields_nothing_and_gives_the_image_back() -> None:
    world = World(content=bytearray())

    assert list(operations.read(_open(world), whole(0))) == []
    assert world.journal == ["close", "free"]


def test_a_read_that_fails_gives_the_image_back() -> None:
    def fail(at: int) -> None:
        if at:
            raise BackendError("gone")

    world = World(on_piece=fail)
    pieces = operations.read(_open(world), whole(10))
    next(pieces)

    with pytest.raises(BackendError):
        next(pieces)
    assert world.journal == ["close", "free"]


def test_a_read_that_nobody_takes_to_its_end_gives_the_image_back() -> None:
    world = World()
    pieces = operations.read(_open(world), whole(10))
    next(pieces)

    pieces.close()

    assert world.journal == ["close", "free"]


def test_the_back_ends_own_reading_ends_before_the_back_end_is_closed() -> None:
    world = World()
    session = _open(world)
    ends = []

    def read(_start: int, _length: int) -> Generator[memoryview]:
        try:
            yield memoryview(b"0123")
        finally:
            ends.append(world.opened[0].closed)

    session.backend.read = read  # type: ignore[method-assign]
    pieces = operations.read(session, whole(10))
    next(pieces)
    pieces.close()

    assert ends == [False]


def test_writing_takes_the_source_to_the_span() -> None:
    world = World()

    operations.write(_open(world, sessions.WRITE), Span(2, 7, 10), Bytes(b"abcde"))

    assert (world.content, world.progress) == (b"01abcde789", [(0, 5), (3, 5), (5, 5)])


@pytest.mark.parametrize("span", [Span(2, 8, 10), Span(4, 7, 10)], ids=["start", "stop"])
@pytest.mark.parametrize("operation", ["write", "zero"])
def test_an_edge_inside_a_block_is_refused_while_writers_share_the_image(
    span: Span, operation: str
) -> None:
    world = World()
    session = _open(world, sessions.WRITE)
    session.shared, session.backend.align = True, 4
    act = {
        "write": lambda: operations.write(session, span, Bytes(b"abcdef")),
        "zero": lambda: operations.zero(session, span, flush=False),
    }[operation]
    with pytest.raises(BadRequest, match="multiples of 4 bytes while writers share the image"):
        act()

    assert (world.content, world.progress) == (b"0123456789", [])


@pytest.mark.parametrize("span", [Span(4, 8, 10), Span(4, 10, 10)], ids=["blocks", "to-the-end"])
def test_whole_blocks_are_written_while_writers_share_the_image(span: Span) -> None:
    world = World()
    session = _open(world, sessions.WRITE)
    session.shared, session.backend.align = True, 4

    operations.write(session, span, Bytes(b"abcdef"[: span.length]))

    assert world.content[span.start : span.stop] == b"abcdef"[: span.length]


def test_replacing_takes_the_source_for_the_whole() -> None:
    world = World()

    operations.replace(_open(world, sessions.REPLACE), 10, Bytes(b"abcdefghij", piece=9))

    assert (world.content, world.journal) == (b"abcdefghij", ["replace"])
    assert world.progress[-1] == (10, 10)


def _write(session: Session) -> None:
    operations.write(session, whole(10), _Gone())


def _replace(session: Session) -> None:
    operations.replace(session, 10, _Gone())


@pytest.mark.parametrize("write", [_write, _replace])
def test_a_client_that_vanishes_ends_a_write(write: Callable[[Session], None]) -> None:
    world = World()
    session = _open(world, sessions.WRITE)

    with pytest.raises(ClientGone):
        write(session)
    assert world.content == b"0123456789"


@pytest.mark.parametrize(
    ("wants", "can", "journal"),
    [
        pytest.param(False, True, ["zero"], id="not-asked-for"),
        pytest.param(True, True, ["zero", "flush"], id="asked-for"),
        pytest.param(True, False, ["zero"], id="asked-for-but-impossible"),
    ],
)
def test_zeroing_flushes_where_asked_for_and_possible(
    wants: bool, can: bool, journal: list[str]
) -> None:
    info = ImageInfo(10, read_only=False, can_zero=True, can_flush=can, flushes_image=True)
    world = World(info=info)

    operations.zero(_open(world, sessions.ZERO), Span(2, 4, 10), flush=wants)

    assert (world.content, world.journal) == (b"01\0\x00456789", journal)
    assert world.progress == [(0, 2), (2, 2)]


def _write_bytes(session: Session, *, flush: bool) -> bool:
    return operations.write(session, whole(10), Bytes(b"x" * 10), flush=flush)


def _replace_bytes(session: Session, *, flush: bool) -> bool:
    return operations.replace(session, 10, Bytes(b"x" * 10), flush=flush)


@pytest.mark.parametrize("write", [_write_bytes, _replace_bytes])
@pytest.mark.parametrize(
    ("asked", "can", "covers", "flushes", "done"),
    [
        pytest.param(False, True, True, 0, False, id="not-asked-for"),
        pytest.param(True, True, True, 1, True, id="asked-for"),
        pytest.param(False, True, False, 1, False, id="no-other-flush-would-do"),
        pytest.param(True, True, False, 1, True, id="asked-for-and-no-other-would-do"),
        pytest.param(True, False, False, 0, False, id="asked-for-but-impossible"),
        pytest.param(False, False, False, 0, False, id="impossible"),
    ],
)
def test_a_write_is_flushed_where_asked_for_or_where_no_other_flush_covers_it(
    write: Callable[..., bool], asked: bool, can: bool, covers: bool, flushes: int, done: bool
) -> None:
    info = ImageInfo(10, read_only=False, can_zero=True, can_flush=can, flushes_image=covers)
    world = World(info=info)

    assert write(_open(world, sessions.WRITE), flush=asked) is done
    assert world.content == b"x" * 10
    assert world.journal.count("flush") == flushes
    assert world.journal[-1:] == ["flush"] * flushes or not flushes


def test_zeros_that_no_other_flush_covers_are_flushed_unasked() -> None:
    world = World(info=ImageInfo(10, read_only=False, can_zero=True, can_flush=True))

    operations.zero(_open(world, sessions.ZERO), Span(2, 4, 10), flush=False)

    assert world.journal == ["zero", "flush"]


def test_a_write_whose_own_flush_fails_has_failed() -> None:
    info = ImageInfo(10, read_only=False, can_zero=True, can_flush=True)
    world = World(info=info, fail={"flush": BackendError("EIO")})

    with pytest.raises(BackendError):
        _write_bytes(_open(world, sessions.WRITE), flush=False)


def test_flushing_flushes() -> None:
    world = World()

    operations.flush(_open(world, sessions.FLUSH))

    assert world.journal == ["flush"]


def test_an_export_that_cannot_flush_says_so() -> None:
    info = ImageInfo(10, read_only=False, can_zero=True, can_flush=False)
    world = World(info=info)

    with pytest.raises(BadRequest, match=r"^flush not supported by this export$"):
        operations.flush(_open(world, sessions.FLUSH))
    assert world.journal == []


@pytest.mark.parametrize("dirty", [False, True])
def test_extents_come_in_the_back_ends_lists_and_show_progress(dirty: bool) -> None:
    batches = [[(0, 4, False, dirty), (4, 2, True, dirty)], [(6, 4, False, False)], []]
    world = World(batches=batches)

    found = list(operations.extents(_open(world, sessions.EXTENTS), whole(10), dirty=dirty))

    assert (found, world.progress) == (batches, [(0, 10), (6, 10), (10, 10)])
    assert world.journal == [f"extents 0-10 dirty={dirty}", "close", "free", "unlock"]


def test_extents_of_a_span_show_progress_within_it() -> None:
    world = World(batches=[[(4, 2, False, False)], [(6, 1, True, False)]])

    list(operations.extents(_open(world, sessions.EXTENTS), Span(4, 7, 10), dirty=False))

    assert world.journal[0] == "extents 4-7 dirty=False"
    assert world.progress == [(0, 3), (2, 3), (3, 3)]


def test_extents_given_up_half_way_give_the_image_back() -> None:
    world = World(batches=[[(0, 4, False, False)], [(4, 6, True, False)]])
    found = operations.extents(_open(world, sessions.EXTENTS), whole(10), dirty=False)
    next(found)

    found.close()

    assert world.journal[-3:] == ["close", "free", "unlock"]


def test_a_read_only_image_allows_reading_only() -> None:
    info = ImageInfo(10, read_only=True, can_zero=True, can_flush=True)

    with pytest.raises(MethodNotAllowed) as raised:
        operations.check_writable(info)
    assert raised.value.allowed == ("GET", "HEAD", "OPTIONS")


def test_a_writable_image_may_be_written() -> None:
    operations.check_writable(ImageInfo(10, read_only=False, can_zero=False, can_flush=False))
