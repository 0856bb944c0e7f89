# SPDX-License-Identifier: Apache-2.0
"""Conditional requests: what is answered, and what is not touched."""

import json

import pytest
from falcon import testing

from imageserver.core.errors import ImageChanged
from imageserver.core.kinds import ImageInfo
from imageserver.core.validators import Validators
from tests.unit.fakes import World
from tests.unit.webapp import COMMON, Call, app_over, error_of

STATE = Validators('"a"', 784111777)
DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
OF_STATE = COMMON | {"cache-control": "no-cache", "etag": '"a"'}
SHOWN = OF_STATE | {
    "last-modified": DATE,
    "content-type": "application/octet-stream",
    "content-length": "10",
}
RANGE = {"Content-Type": "application/octet-stream", "Range": "bytes=0-3"}
ZERO = {"Content-Type": "application/json"}
FAILED = (412, "precondition failed")


@pytest.fixture
def world() -> World:
    return World(info=ImageInfo(10, False, True, True, multi_conn=True, state=STATE))


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_an_image_with_validators_shows_them_and_may_be_kept(
    client: testing.TestClient, method: str
) -> None:
    result = client.simulate_request(method, "/images/f1")

    assert (result.status_code, result.headers) == (200, SHOWN)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "condition", [{"If-None-Match": '"b", W/"a"'}, {"If-Modified-Since": DATE}], ids=str
)
def test_what_the_client_has_is_304_without_a_body(
    client: testing.TestClient, world: World, method: str, condition: dict[str, str]
) -> None:
    result = client.simulate_request(method, "/images/f1", headers=condition)

    assert (result.status_code, result.headers, result.content) == (304, OF_STATE, b"")
    assert all(backend.closed for backend in world.opened)
    assert world.journal.count("free") == world.journal.count("slot READ")


@pytest.mark.parametrize(
    ("if_range", "status", "body"),
    [('"a"', 206, b"23"), ('"b"', 200, b"0123456789"), (DATE, 200, b"0123456789")],
)
def test_a_range_counts_only_if_the_image_is_in_that_state(
    client: testing.TestClient, if_range: str, status: int, body: bytes
) -> None:
    headers = {"Range": "bytes=2-3", "If-Range": if_range}
    result = client.simulate_get("/images/f1", headers=headers)

    assert (result.status_code, result.content, result.headers["etag"]) == (status, body, '"a"')


def test_a_malformed_range_is_400_where_if_range_matches(client: testing.TestClient) -> None:
    headers = {"Range": "bytes=x", "If-Range": '"a"'}
    result = client.simulate_get("/images/f1", headers=headers)

    assert error_of(result) == (400, "invalid Range header")


def test_conditions_count_before_the_range(client: testing.TestClient) -> None:
    headers = {"Range": "bytes=10-", "If-Match": '"b"'}
    result = client.simulate_get("/images/f1", headers=headers)

    assert error_of(result) == FAILED
    assert result.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "transfer", "headers", "body"),
    [
        pytest.param("PUT", "f1", {}, b"9876543210", id="file"),
        pytest.param("PUT", "t1", {}, b"9876543210", id="whole"),
        pytest.param("PUT", "t1", {"Content-Range": "bytes 0-3/*"}, b"9876", id="part"),
        pytest.param("PATCH", "t1", RANGE, b"9876", id="range"),
        pytest.param(
            "PATCH", "t1", ZERO, json.dumps({"op": "zero", "size": 4}).encode(), id="zero"
        ),
    ],
)
@pytest.mark.parametrize(
    ("condition", "is_done"),
    [
        ({"If-Match": '"a"'}, True),
        ({"If-Match": "*"}, True),
        ({"If-Unmodified-Since": DATE}, True),
        ({"If-Match": '"b"'}, False),
        ({"If-None-Match": "*"}, False),
        ({"If-None-Match": '"a"'}, False),
        ({"If-Unmodified-Since": "Sun, 06 Nov 1994 08:49:36 GMT"}, False),
        ({"If-Modified-Since": DATE}, True),
    ],
    ids=str,
)
def test_an_image_is_changed_only_in_the_state_that_is_asked_for(
    world: World,
    method: str,
    transfer: str,
    headers: dict[str, str],
    body: bytes,
    condition: dict[str, str],
    is_done: bool,
) -> None:
    client = testing.TestClient(app_over(world))
    path = f"/images/{transfer}"
    result = client.simulate_request(method, path, headers=headers | condition, body=body)

    assert (result.status_code == 200) is is_done
    assert (world.content[:4] != b"0123") is is_done
    if not is_done:
        assert error_of(result) == FAILED


@pytest.mark.parametrize("condition", [{"If-Match": '"a"'}, {"If-Unmodified-Since": DATE}], ids=str)
def test_who_depends_on_a_state_shares_the_image_with_no_other_writer(
    world: World, condition: dict[str, str]
) -> None:
    app = app_over(world, shares_lock=True)
    testing.TestClient(app).simulate_patch("/images/t1", headers=RANGE | condition, body=b"9876")

    assert "slot WRITE alone" in world.journal
    assert "share" not in world.journal


def test_other_methods_ignore_conditions(client: testing.TestClient) -> None:
    wrong = {"If-Match": '"b"'}

    assert client.simulate_options("/images/t1", headers=wrong).status_code == 200
    assert client.simulate_post("/images/t1/flush", headers=wrong).status_code == 200
    flush = client.simulate_patch("/images/t1", headers=ZERO | wrong, body=b'{"op":"flush"}')
    assert flush.status_code == 200


@pytest.mark.parametrize("name", ["If-Match", "If-None-Match"])
def test_a_malformed_condition_is_400_and_opens_nothing(
    client: testing.TestClient, world: World, name: str
) -> None:
    for method in ("HEAD", "GET", "PUT"):
        result = client.simulate_request(method, "/images/f1", headers={name: "a"}, body=b"x")
        assert result.status_code == 400
    assert error_of(result) == (400, f"invalid {name} header")
    assert world.opened == []


@pytest.mark.parametrize(
    ("transfer", "headers", "is_cut"),
    [
        pytest.param("f1", {}, True, id="file"),
        pytest.param("t1", {}, False, id="written in parts"),
        pytest.param("t1", {"If-Match": '"a"'}, True, id="written in parts, of one state"),
        pytest.param("t1", {"If-Match": "*"}, False, id="written in parts, of any state"),
        pytest.param(
            "t1", {"Range": "bytes=0-", "If-Range": '"a"'}, True, id="the rest of one state"
        ),
    ],
)
def test_bytes_of_another_state_are_never_sent_as_of_this_one(
    world: World,
    transfer: str,
    headers: dict[str, str],
    is_cut: bool,
) -> None:
    call = Call(app_over(world), "GET", f"/images/{transfer}", headers)
    pieces = iter(call.pieces)
    first = next(pieces)
    world.is_unchanged = lambda: False

    assert call.headers["etag"] == '"a"'
    if is_cut:
        with pytest.raises(ImageChanged):
            next(pieces)
    else:
        assert first + b"".join(pieces) == b"0123456789"
    call.close()
    assert world.journal[-2:] == ["close", "free"]
