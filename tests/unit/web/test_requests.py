# SPDX-License-Identifier: Apache-2.0
"""What journals are told of each request: once, at its end, whatever the end is."""

import contextlib
import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from falcon import testing

from imageserver.core.entry import Entry
from imageserver.core.errors import BackendError, ClientGone, ImageBusy
from imageserver.core.ranges import Span
from imageserver.web.requests import AFTERWARDS
from tests.unit.fakes import World
from tests.unit.webapp import Call, app_over


class Journal:
    """``ports.Journal``: keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def finished(self, entry: Entry) -> None:
        assert entry.seconds >= 0
        self.entries.append(entry._replace(seconds=0.0))


@pytest.fixture
def journal() -> Journal:
    return Journal()


def _entry(**fields: object) -> Entry:
    usual: dict[str, object] = {
        "method": "GET",
        "transfer": "t1",
        "operation": "read",
        "backend": "nbd",
        "span": Span(0, 10, 10),
        "done": 10,
        "status": 200,
        "error": "",
        "detail": "",
        "seconds": 0.0,
        "client": "127.0.0.1",
        "request": "r1",
    }
    return Entry(**(usual | fields))  # type: ignore[arg-type]


def _ask(journal: Journal, method: str, path: str, **more: object) -> testing.Result:
    """Ask for a path; ``world`` and what Falcon's test client takes as keywords."""
    world = more.pop("world", World())
    assert isinstance(world, World)
    client = testing.TestClient(app_over(world, journal), headers={"X-Request-Id": "r1"})
    return client.simulate_request(method, path, **more)


_FULL = {"method": "PUT", "operation": "replace"}
_DONE: dict[str, tuple[tuple[str, str], dict[str, object], dict[str, object]]] = {
    "read": (("GET", "/images/t1"), {}, {}),
    "range": (
        ("GET", "/images/t1"),
        {"headers": {"Range": "bytes=2-4"}},
        {"span": Span(2, 5, 10), "done": 3, "status": 206},
    ),
    "extents": (
        ("GET", "/images/t1/extents"),
        {"world": World(batches=[[(0, 10, False, True)]])},
        {"operation": "extents"},
    ),
    "put": (("PUT", "/images/t1"), {"body": b"abcdefghij"}, _FULL),
    "patch": (
        ("PATCH", "/images/t1"),
        {"body": b"abc", "headers": {"Range": "bytes=1-3"}},
        {"method": "PATCH", "operation": "write", "span": Span(1, 4, 10), "done": 3},
    ),
    "zero": (
        ("PATCH", "/images/t1"),
        {"json": {"op": "zero", "offset": 4, "size": 99}},
        {"method": "PATCH", "operation": "zero", "span": Span(4, 10, 10), "done": 6},
    ),
    "flush": (
        ("POST", "/images/t1/flush"),
        {},
        {"method": "POST", "operation": "flush", "span": None, "done": 0},
    ),
    "options": (
        ("OPTIONS", "/images/t1"),
        {},
        {"method": "OPTIONS", "operation": "options", "span": None, "done": 0},
    ),
    "head": (
        ("HEAD", "/images/t1"),
        {},
        {"method": "HEAD", "operation": "head", "span": None, "done": 0},
    ),
}


@pytest.mark.parametrize(("asked", "more", "told"), _DONE.values(), ids=_DONE)
def test_a_request_that_succeeds_is_told_of_once(
    journal: Journal, asked: tuple[str, str], more: dict[str, object], told: dict[str, object]
) -> None:
    _ask(journal, *asked, **more)

    assert journal.entries == [_entry(**told)]


_NOTHING = {"span": None, "done": 0}
_REFUSED: dict[str, tuple[str, dict[str, object]]] = {
    "no-route": (
        "/nowhere",
        {"transfer": "", "operation": "get", "backend": "", "status": 404, "error": "NotFound"},
    ),
    "unknown": (
        "/images/nobody",
        {
            "transfer": "nobody",
            "operation": "get",
            "backend": "",
            "status": 404,
            "error": "UnknownImage",
        },
    ),
    "method": (
        "/images/t1/flush",
        {"operation": "get", "status": 405, "error": "MethodNotAllowed", "detail": "POST"},
    ),
}


@pytest.mark.parametrize(("path", "told"), _REFUSED.values(), ids=_REFUSED)
def test_a_request_that_comes_to_no_operation_is_told_of(
    journal: Journal, path: str, told: dict[str, object]
) -> None:
    _ask(journal, "GET", path)

    details = [entry.detail for entry in journal.entries]
    assert journal.entries == [_entry(**_NOTHING | {"detail": details[0]} | told)]


@pytest.mark.parametrize(
    ("fail", "error", "status"),
    [
        ("lock", ImageBusy("held"), 409),
        ("open FLUSH", BackendError("/run/secret.sock: refused"), 500),
        ("flush", ZeroDivisionError("a bug"), 500),
    ],
)
def test_what_goes_wrong_is_told_with_its_text(
    journal: Journal, fail: str, error: Exception, status: int
) -> None:
    result = _ask(journal, "POST", "/images/t1/flush", world=World(fail={fail: error}))

    told = {"status": status, "error": type(error).__name__, "detail": str(error)}
    assert result.status_code == status
    assert journal.entries == [_entry(method="POST", operation="flush", **_NOTHING, **told)]


def _vanish(call: Call) -> None:
    call.close()


def _vanish_after_a_piece(call: Call) -> None:
    pieces = iter(call.pieces)
    next(pieces)
    next(pieces)  # so the first has been taken
    call.close()


@pytest.mark.parametrize(("take", "done"), [(_vanish, 0), (_vanish_after_a_piece, 4)])
def test_a_client_that_vanishes_has_what_it_took(
    journal: Journal, take: Callable[[Call], None], done: int
) -> None:
    app = app_over(World(), journal)
    take(Call(app, "GET", "/images/t1", {"X-Request-Id": "r1"}))

    assert journal.entries == [_entry(done=done, error="ClientGone")]


def test_a_back_end_that_fails_later_is_told_with_the_bytes_before_it(journal: Journal) -> None:
    def fail(at: int) -> None:
        if at:
            raise BackendError("died")

    call = Call(
        app_over(World(on_piece=fail), journal), "GET", "/images/t1", {"X-Request-Id": "r1"}
    )
    with pytest.raises(BackendError):
        call.read()
    call.close()

    assert journal.entries == [_entry(done=4, error="BackendError", detail="died")]


def test_a_client_that_vanishes_before_the_answer_has_no_status(journal: Journal) -> None:
    app = app_over(World(fail={"flush": ClientGone()}), journal)
    with contextlib.suppress(ClientGone):
        Call(app, "POST", "/images/t1/flush", {"X-Request-Id": "r1"})

    told = {"method": "POST", "operation": "flush", "status": 0, "error": "ClientGone"}
    assert journal.entries == [_entry(**_NOTHING, **told)]


@pytest.mark.parametrize(
    "given", ["", "a b", "x" * 129, 'say"hi"', "Ümlaut", "a,b", "{}"], ids=lambda text: text[:8]
)
def test_an_id_that_could_spoil_a_log_is_replaced(journal: Journal, given: str) -> None:
    environ = {"HTTP_X_REQUEST_ID": given}
    call = Call(app_over(World(), journal), "OPTIONS", "/images/t1", **environ)

    made = call.headers["x-request-id"]
    assert made != given
    assert len(bytes.fromhex(made)) == 8
    assert [entry.request for entry in journal.entries] == [made]


def test_every_request_gets_an_id_of_its_own(journal: Journal) -> None:
    app = app_over(World(), journal)
    made = [Call(app, "OPTIONS", "/images/t1").headers["x-request-id"] for _ in range(100)]

    assert len(set(made)) == 100


def test_an_unknown_id_is_told_in_part(journal: Journal) -> None:
    _ask(journal, "GET", "/images/" + "x" * 999)

    assert [entry.transfer for entry in journal.entries] == ["x" * 256]


def test_requests_that_bring_no_id_get_one_that_no_other_has() -> None:
    workers = [testing.TestClient(app_over(World())) for _ in range(3)]
    with ThreadPoolExecutor(4) as threads:
        answers = threads.map(
            lambda worker: worker.simulate_options("/images/*"),
            itertools.islice(itertools.cycle(workers), 300),
        )
        names = [answer.headers["X-Request-Id"] for answer in answers]

    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)


@pytest.mark.parametrize("given", ["", "a b", "a,b", "x" * 129])
def test_an_id_that_will_not_do_is_replaced(given: str) -> None:
    client = testing.TestClient(app_over(World()))
    answer = client.simulate_options("/images/*", headers={"X-Request-Id": given})

    assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-Id"])


def test_where_the_server_says_when_an_answer_is_sent_journals_are_told_then(
    journal: Journal,
) -> None:
    afterwards: list[Callable[[], None]] = []

    _ask(journal, "OPTIONS", "/images/*", extras={AFTERWARDS: afterwards})
    assert journal.entries == []

    for tell in afterwards:
        tell()
    assert [entry.operation for entry in journal.entries] == ["options"]
