# SPDX-License-Identifier: Apache-2.0
"""``?flush`` with either default, and ``?close`` of GET and PUT."""

import pytest
from falcon import testing

from imageserver.web.requests import FORCE_CLOSE
from tests.unit.fakes import World
from tests.unit.webapp import Call, app_over, error_of

PART = {"Content-Range": "bytes 0-9/*"}


@pytest.mark.parametrize("headers", [{}, PART], ids=["whole", "part"])
@pytest.mark.parametrize(
    ("query", "put_flushes", "flushed", "told"),
    [
        ("", False, False, None),
        ("", True, True, None),
        ("?flush=n", True, False, False),
        ("?flush=y", False, True, True),
    ],
)
def test_a_put_is_flushed_as_it_asks_or_as_is_set(
    query: str, put_flushes: bool, flushed: bool, told: bool | None, headers: dict[str, str]
) -> None:
    world = World()
    client = testing.TestClient(app_over(world, put_flushes=put_flushes))
    result = client.simulate_put(f"/images/t1{query}", body="9876543210", headers=headers)

    assert (result.status_code, result.json.get("flushed")) == (200, told)
    assert ("flush" in world.journal) is flushed


@pytest.mark.parametrize(("method", "body"), [("GET", b""), ("PUT", b"9876543210")])
@pytest.mark.parametrize(("query", "closes"), [("close=y", 1), ("close=n", 0), ("", 0)])
def test_a_client_may_ask_for_the_connections_end(
    method: str, body: bytes, query: str, closes: int
) -> None:
    closed: list[None] = []
    environ = {"QUERY_STRING": query, FORCE_CLOSE: lambda: closed.append(None)}
    call = Call(app_over(World()), method, "/images/t1", body=body, **environ)
    call.read()

    assert (call.status, len(closed)) == (200, closes)


def test_under_a_server_that_has_no_such_way_it_is_served_all_the_same() -> None:
    call = Call(app_over(World()), "GET", "/images/t1", QUERY_STRING="close=y")

    assert (call.status, call.read()) == (200, b"0123456789")


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("query", ["close=", "close=Y", "close=1", "close=y&close=y"])
def test_any_other_word_is_400_and_takes_nothing(method: str, query: str) -> None:
    world = World()
    result = testing.TestClient(app_over(world)).simulate_request(
        method, "/images/t1", query_string=query, body="9876543210"
    )

    assert error_of(result) == (400, 'invalid "close": it must be y or n')
    assert world.journal == []
