# SPDX-License-Identifier: Apache-2.0
"""Bodies: who owns an image while it is streamed, and how bytes come in."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import falcon
import pytest
from falcon import testing

from imageserver.core import ranges
from imageserver.core.errors import BackendError, BadRequest, ClientGone
from imageserver.images import operations, sessions
from imageserver.web.body import ZERO_COPY, RequestSource, StreamedBody, read_all
from tests.unit.fakes import TRANSFER, World, a_request
from tests.unit.webapp import Call, app_over

GIVEN_BACK = ["close", "free"]


def _fail_at(offset: int, error: BaseException) -> Callable[[int], None]:
    def fail(at: int) -> None:
        if at >= offset:
            raise error

    return fail


# Out


def test_without_zero_copy_pieces_are_bytes() -> None:
    call = Call(app_over(World()), "GET", "/images/t1")

    assert [type(piece) for piece in call.pieces] == [bytes] * 3


def test_with_zero_copy_pieces_are_passed_on_as_they_are() -> None:
    call = Call(app_over(World()), "GET", "/images/t1", **{ZERO_COPY: True})

    pieces = list(call.pieces)
    assert [type(piece) for piece in pieces] == [memoryview] * 3
    assert b"".join(pieces) == b"0123456789"


def test_a_body_has_no_read_for_file_wrappers_to_take() -> None:
    wrapped: list[object] = []
    wrapper = {"wsgi.file_wrapper": lambda stream, _size: wrapped.append(stream)}

    assert Call(app_over(World()), "GET", "/images/t1", **wrapper).read() == b"0123456789"
    assert wrapped == []


def test_pieces_come_one_by_one_as_the_back_end_gives_them() -> None:
    asked: list[int] = []
    call = Call(app_over(World(on_piece=asked.append)), "GET", "/images/t1")
    pieces = iter(call.pieces)
    seen = [list(asked)]
    for _ in range(3):
        next(pieces)
        seen.append(list(asked))

    # The first is asked for before the answer begins, so that its failure can be answered.
    assert seen == [[0], [0], [0, 4], [0, 4, 8]]


def test_the_image_is_given_back_before_the_last_piece() -> None:
    world = World()
    pieces = iter(Call(app_over(world), "GET", "/images/t1").pieces)
    held = []
    for _ in range(3):
        next(pieces)
        held.append("close" not in world.journal)

    assert held == [True, True, False]


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_extents_give_the_image_back_before_the_list_ends(batches: int) -> None:
    world = World(batches=[[(n, 1, False, False)] for n in range(batches)])
    call = Call(app_over(world), "GET", "/images/t1/extents")
    held = [(piece[-1:], "unlock" not in world.journal) for piece in call.pieces]

    assert held == [(b"}", True)] * batches + [(b"]", False)]


def test_closing_an_answer_nobody_took_gives_the_image_back() -> None:
    world = World()
    call = Call(app_over(world), "GET", "/images/t1")
    call.close()

    assert world.journal[-2:] == GIVEN_BACK


def test_closing_an_answer_half_way_gives_the_image_back() -> None:
    world = World()
    call = Call(app_over(world), "GET", "/images/t1")
    next(iter(call.pieces))
    call.close()
    call.close()

    assert world.journal[-2:] == GIVEN_BACK
    assert world.journal.count("close") == 1


def test_a_failure_before_the_first_byte_is_answered_and_gives_the_image_back() -> None:
    world = World(on_piece=_fail_at(0, BackendError("gone")))
    call = Call(app_over(world), "GET", "/images/t1")

    assert (call.status, call.read()) == (500, b'{"error":"backend error"}')
    assert call.headers["content-type"] == "application/json"
    assert "content-range" not in call.headers
    assert world.journal[-2:] == GIVEN_BACK


def test_a_failure_after_the_first_byte_breaks_the_body_and_gives_the_image_back() -> None:
    world = World(on_piece=_fail_at(4, BackendError("gone")))
    call = Call(app_over(world), "GET", "/images/t1")

    with pytest.raises(BackendError):
        call.read()
    assert call.status == 200
    assert world.journal[-2:] == GIVEN_BACK


def _request() -> falcon.Request:
    return falcon.Request(testing.create_environ())


def _failing() -> Generator[bytes]:
    raise BackendError("gone")
    yield b""


@pytest.mark.parametrize("pieces", [_failing, lambda: (piece for piece in [b"a", b"b"])])
def test_a_body_gives_back_an_image_that_its_pieces_do_not_know_of(
    pieces: Callable[[], Generator[bytes]],
) -> None:
    world = World()
    session = world.sessions().open(TRANSFER, sessions.READ, a_request())

    with contextlib.suppress(BackendError):
        StreamedBody(_request(), session, pieces()).close()
    assert world.journal[-2:] == GIVEN_BACK


class _Drops:
    """A resource that makes a streamed answer and then has Falcon drop it."""

    def __init__(self, world: World, then: Callable[[falcon.Response], None]) -> None:
        self._world = world
        self._then = then

    def check_method(self, *_: object) -> None: ...

    def on_get(self, req: falcon.Request, resp: falcon.Response, transfer: Any) -> None:
        session = self._world.sessions().open(transfer, sessions.READ, req.context.request)
        pieces = operations.read(session, ranges.whole(session.size))
        resp.stream = StreamedBody(req, session, pieces)
        self._then(resp)

    on_head = on_get


def _raise(_resp: falcon.Response) -> None:
    raise BackendError("after the stream was set")


def _no_content(resp: falcon.Response) -> None:
    resp.status = falcon.HTTP_NO_CONTENT


@pytest.mark.parametrize(
    ("method", "then", "status"),
    [
        pytest.param("HEAD", lambda _: None, 200, id="head"),
        pytest.param("GET", _raise, 500, id="error-after-stream"),
        pytest.param("GET", _no_content, 204, id="no-content"),
    ],
)
def test_a_stream_that_falcon_drops_is_closed(
    method: str, then: Callable[[falcon.Response], None], status: int
) -> None:
    world = World()
    app = app_over(world)
    app.add_route("/drops/{image_id}", _Drops(world, then))

    call = Call(app, method, "/drops/t1")
    assert (call.status, b"" if status != 500 else call.read()[:8]) == (
        status,
        b"" if status != 500 else b'{"error"',
    )
    call.close()
    assert world.journal[-2:] == GIVEN_BACK


# In


class _Input:
    """``wsgi.input`` of either kind, a few bytes at a time."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)
        self.asked: list[int] = []

    def read(self, size: int) -> bytes:
        self.asked.append(size)
        piece = self._pieces.pop(0) if self._pieces else b""
        assert len(piece) <= size
        return piece

    def readinto(self, buffer: memoryview, _until: object = None) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def _source(zero_copy: bool, length: int, *pieces: bytes) -> tuple[RequestSource, _Input]:
    stream = _Input(*pieces)
    environ = testing.create_environ() | {"wsgi.input": stream, ZERO_COPY: zero_copy}
    return RequestSource(falcon.Request(environ), length), stream


@pytest.mark.parametrize("zero_copy", [False, True])
def test_a_source_gives_what_has_arrived_and_asks_for_no_more_than_the_body(
    zero_copy: bool,
) -> None:
    source, stream = _source(zero_copy, 5, b"ab", b"cde", b"next request")
    buffer = memoryview(bytearray(4))

    counts = [source.readinto(buffer[:n]) for n in (0, 4, 4, 4)]
    assert (counts, bytes(buffer), stream.asked) == ([0, 2, 3, 0], b"cde\0", [4, 3])


@pytest.mark.parametrize("zero_copy", [False, True])
def test_a_source_that_ends_early_reads_as_its_end(zero_copy: bool) -> None:
    source, _ = _source(zero_copy, 5, b"ab")
    buffer = memoryview(bytearray(5))

    assert [source.readinto(buffer) for _ in range(3)] == [2, 0, 0]


def test_a_broken_connection_is_a_vanished_client() -> None:
    source, stream = _source(False, 5)
    stream.read = lambda _: (_ for _ in ()).throw(ConnectionResetError())  # type: ignore[method-assign]

    with pytest.raises(ClientGone):
        source.readinto(memoryview(bytearray(5)))


@pytest.mark.parametrize("pieces", [(b"abc",), (b"a", b"b", b"c")], ids=["whole", "in-pieces"])
def test_a_small_body_is_read_whole(pieces: tuple[bytes, ...]) -> None:
    environ = testing.create_environ() | {"wsgi.input": _Input(*pieces)}

    assert read_all(falcon.Request(environ), 3) == b"abc"


def test_a_small_body_that_ends_early_is_the_clients_fault() -> None:
    environ = testing.create_environ() | {"wsgi.input": _Input(b"ab")}

    with pytest.raises(BadRequest, match=r"^request body truncated$"):
        read_all(falcon.Request(environ), 3)


# Visits: what is known of a transfer's use


class _Gone:
    def read(self, _size: int) -> bytes:
        raise ConnectionResetError


def test_a_visit_ends_with_the_last_piece_of_its_answer() -> None:
    world = World()
    call = Call(app_over(world), "GET", "/images/ex")
    begun = list(world.journal)
    call.read()

    assert begun == ["visit", "slot READ", "open READ"]
    assert world.journal[3:] == ["close", "free", "leave"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("HEAD", "/images/ex", id="head"),
        pytest.param("OPTIONS", "/images/ex", id="options"),
        pytest.param("DELETE", "/images/ex", id="refused"),
        pytest.param("POST", "/images/ex/flush", id="flush"),
    ],
)
def test_a_visit_ends_with_its_answer(method: str, path: str) -> None:
    world = World()
    Call(app_over(world), method, path)

    assert world.journal[-1] == "leave"


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        pytest.param("PUT", {}, id="put"),
        pytest.param("PATCH", {"Range": "bytes=0-9"}, id="range"),
        pytest.param("PATCH", {"Content-Type": "application/json"}, id="json"),
    ],
)
def test_a_visit_ends_with_its_client(method: str, headers: dict[str, str]) -> None:
    world = World()
    broken = {"wsgi.input": _Gone(), "CONTENT_LENGTH": "10"}

    with pytest.raises(ClientGone):
        Call(app_over(world), method, "/images/ex", headers, **broken)
    assert world.journal[-1] == "leave"
