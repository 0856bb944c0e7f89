# SPDX-License-Identifier: Apache-2.0
"""The application under a plain WSGI server: routes, headers, answers; no zero-copy, no socket."""

import json
from types import SimpleNamespace
from typing import Any

import falcon
import pytest
from falcon import testing

from imageserver.core.errors import BackendError, ImageBusy
from imageserver.core.kinds import ImageInfo
from imageserver.images.probing import Asking, WouldWait
from imageserver.web.body import ASKING
from imageserver.web.image_resource import Limits
from tests.unit.fakes import World
from tests.unit.webapp import Call, app_over

COMMON = {
    "accept-ranges": "bytes",
    "access-control-allow-methods": "GET, PUT, OPTIONS",
    "cache-control": "no-store",
    "x-request-id": "r1",
}
JSON = {"content-type": "application/json"}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def client(world: World) -> testing.TestClient:
    return testing.TestClient(app_over(world), headers={"X-Request-Id": "r1"})


def _error(result: testing.Result) -> tuple[int, str]:
    assert result.json.keys() == {"error"}
    return result.status_code, result.json["error"]


# Reading


def test_a_whole_image_is_200(client: testing.TestClient, world: World) -> None:
    result = client.simulate_get("/images/t1")

    assert (result.status_code, result.content) == (200, b"0123456789")
    assert result.headers == COMMON | {
        "content-type": "application/octet-stream",
        "content-length": "10",
    }
    assert world.journal == ["slot READ", "open READ", "close", "free"]


@pytest.mark.parametrize(
    ("header", "body", "content_range"),
    [
        ("bytes=2-5", b"2345", "bytes 2-5/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
        ("bytes=9-", b"9", "bytes 9-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
    ],
)
def test_a_range_is_206(
    client: testing.TestClient, header: str, body: bytes, content_range: str
) -> None:
    result = client.simulate_get("/images/t1", headers={"Range": header})

    assert (result.status_code, result.content) == (206, body)
    assert result.headers["content-range"] == content_range
    assert result.headers["content-length"] == str(len(body))


def test_if_range_never_matches(client: testing.TestClient) -> None:
    result = client.simulate_get("/images/t1", headers={"Range": "bytes=0-1", "If-Range": '"x"'})

    assert (result.status_code, result.content) == (200, b"0123456789")


def test_a_range_outside_the_image_gives_everything_back(
    client: testing.TestClient, world: World
) -> None:
    result = client.simulate_get("/images/t1", headers={"Range": "bytes=10-"})

    assert _error(result) == (416, "range not satisfiable")
    assert result.headers["content-range"] == "bytes */10"
    assert world.journal == ["slot READ", "open READ", "close", "free"]


def test_a_malformed_range_takes_nothing(client: testing.TestClient, world: World) -> None:
    result = client.simulate_get("/images/t1", headers={"Range": "bytes=1-2,4-5"})

    assert _error(result) == (400, "invalid Range header")
    assert world.journal == []


def test_an_empty_image_is_an_empty_body() -> None:
    result = testing.TestClient(app_over(World(content=bytearray()))).simulate_get("/images/t1")

    assert (result.status_code, result.content, result.headers["content-length"]) == (200, b"", "0")


def test_head_has_the_headers_of_get_and_takes_no_slot(
    client: testing.TestClient, world: World
) -> None:
    get = client.simulate_get("/images/t1").headers
    world.journal.clear()
    head = client.simulate_head("/images/t1", headers={"Range": "bytes=0-1"})

    assert (head.status_code, head.headers, head.content) == (200, get, b"")
    assert world.journal == ["open INSPECT", "close"]


# Writing


def test_a_put_replaces_the_image(client: testing.TestClient, world: World) -> None:
    result = client.simulate_put("/images/t1", body=b"abcdefghij")

    assert (result.status_code, result.json) == (200, {"ok": True, "bytes_written": 10})
    assert (result.headers, world.content) == (
        COMMON | JSON | {"content-length": str(len(result.content))},
        b"abcdefghij",
    )


def test_a_put_of_another_size_names_both(client: testing.TestClient, world: World) -> None:
    result = client.simulate_put("/images/t1", body=b"abc")

    assert _error(result) == (400, "Content-Length (3) must equal export size (10)")
    assert world.journal[-3:] == ["close", "free", "unlock"]


def test_a_range_write_writes_there(client: testing.TestClient, world: World) -> None:
    result = client.simulate_patch("/images/t1", headers={"Range": "bytes=2-4"}, body=b"abc")

    assert (result.status_code, result.json) == (200, {"ok": True, "bytes_written": 3})
    assert world.content == b"01abc56789"


def test_zeroing_zeroes(client: testing.TestClient, world: World) -> None:
    body = b'{"op":"zero","offset":8,"size":100,"flush":true}'
    result = client.simulate_patch("/images/t1", headers=JSON, body=body)

    assert (result.status_code, result.json, world.content) == (200, {"ok": True}, b"01234567\0\0")
    assert world.journal[3:] == ["zero", "flush", "close", "free", "unlock"]


@pytest.mark.parametrize("way", ["post", "patch"])
def test_flushing_flushes(client: testing.TestClient, world: World, way: str) -> None:
    if way == "post":
        result = client.simulate_post("/images/t1/flush")
    else:
        result = client.simulate_patch("/images/t1", headers=JSON, body=b'{"op":"flush"}')

    assert (result.status_code, result.json) == (200, {"ok": True})
    assert world.journal == [
        *("lock", "slot OTHER", "open FLUSH"),
        *("flush", "close", "free", "unlock"),
    ]


def test_a_busy_image_is_refused_before_its_body_is_read() -> None:
    app = app_over(World(fail={"lock": ImageBusy()}))
    unreadable = {"wsgi.input": None, "CONTENT_LENGTH": "10"}

    call = Call(app, "PUT", "/images/t1", **unreadable)

    assert (call.status, call.read()) == (409, b'{"error":"image busy"}')
    assert call.headers["retry-after"] == "1"


# Extents


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("", b'[{"start":0,"length":4,"zero":false},{"start":4,"length":6,"zero":true}]'),
        ("zero", b'[{"start":0,"length":4,"zero":false},{"start":4,"length":6,"zero":true}]'),
        (
            "dirty",
            (
                b'[{"start":0,"length":4,"dirty":true,"zero":false},'
                b'{"start":4,"length":6,"dirty":false,"zero":true}]'
            ),
        ),
    ],
)
def test_extents_are_a_compact_list(
    client: testing.TestClient, world: World, query: str, text: bytes
) -> None:
    world.batches = [[(0, 4, False, True)], [(4, 6, True, False)], []]
    params = {"context": query} if query else {}

    result = client.simulate_get("/images/t1/extents", params=params)

    assert (result.status_code, result.content) == (200, text)
    assert result.headers == COMMON | JSON
    assert world.journal[-3:] == ["close", "free", "unlock"]


def test_an_empty_image_has_an_empty_list(client: testing.TestClient) -> None:
    assert client.simulate_get("/images/t1/extents").content == b"[]"


def test_another_context_is_refused(client: testing.TestClient, world: World) -> None:
    result = client.simulate_get("/images/t1/extents", params={"context": "used"})

    assert (result.status_code, world.journal) == (400, [])


# Options


@pytest.mark.parametrize(
    ("path", "info", "features", "writers", "methods"),
    [
        pytest.param("t1", None, ["extents", "zero", "flush"], 1, "PUT, PATCH", id="nbd"),
        pytest.param("t1", (False, False), ["extents"], 1, "PUT, PATCH", id="nbd-without-either"),
        pytest.param("ro", None, ["extents"], 0, "", id="read-only-transfer"),
        pytest.param("f1", None, ["flush"], 1, "PUT, POST", id="file"),
    ],
)
def test_options_say_what_an_image_can_do(
    world: World,
    client: testing.TestClient,
    path: str,
    info: tuple[bool, bool] | None,
    features: list[str],
    writers: int,
    methods: str,
) -> None:
    if info:
        world.info = ImageInfo(10, read_only=False, can_zero=info[0], can_flush=info[1])
    result = client.simulate_options(f"/images/{path}")

    announced = ", ".join(filter(None, ["GET", methods, "OPTIONS"]))
    assert result.json == {
        "unix_socket": None,
        "features": features,
        "max_readers": 8,
        "max_writers": writers,
    }
    assert result.headers == COMMON | JSON | {
        "content-length": str(len(result.content)),
        "allow": announced.replace("GET", "GET, HEAD"),
        "access-control-allow-methods": announced,
    }


@pytest.mark.parametrize("multi_conn", [False, True])
def test_options_offer_several_writers_where_the_export_bears_them(
    world: World, multi_conn: bool
) -> None:
    world.info = ImageInfo(
        10, read_only=False, can_zero=True, can_flush=True, multi_conn=multi_conn
    )
    limits = Limits(max_readers=8, max_writers=4, unix_socket=None)
    client = testing.TestClient(app_over(world, limits=limits))

    answer = client.simulate_options("/images/t1").json

    assert answer["max_writers"] == (4 if multi_conn else 1)


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD"])
def test_a_probe_that_would_wait_is_passed_back_as_if_it_had_not_come(
    world: World, method: str
) -> None:
    told: list[object] = []
    journal = SimpleNamespace(finished=told.append)
    with pytest.raises(WouldWait):
        Call(app_over(world, journal), method, "/images/ex", **{ASKING: Asking.ELSEWHERE})

    assert (world.journal, told) == (["visit", "leave"], [])


@pytest.mark.parametrize("asking", [Asking.ELSEWHERE, Asking.NEVER])
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("OPTIONS", "/images/*", 200),
        ("OPTIONS", "/images/f1", 200),
        ("HEAD", "/images/f1", 200),
        ("OPTIONS", "/images/unknown", 404),
        ("HEAD", "/images/unknown", 404),
    ],
)
def test_what_needs_no_back_end_is_answered_by_any_thread(
    method: str, path: str, status: int, asking: Asking
) -> None:
    assert Call(app_over(World()), method, path, **{ASKING: asking}).status == status


def test_options_that_nobody_can_ask_for_come_from_the_configuration(world: World) -> None:
    call = Call(app_over(world), "OPTIONS", "/images/t1", **{ASKING: Asking.NEVER})

    assert call.status == 200
    assert json.loads(call.read())["features"] == ["extents", "zero", "flush"]
    assert world.opened == []


def test_a_size_that_nobody_can_ask_for_is_503(world: World) -> None:
    call = Call(app_over(world), "HEAD", "/images/t1", **{ASKING: Asking.NEVER})

    assert (call.status, call.headers["retry-after"], world.opened) == (503, "1", [])


def test_options_of_a_server_that_is_away_come_from_the_configuration(
    client: testing.TestClient, world: World
) -> None:
    world.fail["open INSPECT"] = BackendError("refused")

    result = client.simulate_options("/images/t1")

    assert (result.status_code, result.json["features"]) == (200, ["extents", "zero", "flush"])


# Routes, ids and methods


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [
        ("GET", "/", (404, "not found")),
        ("GET", "/images", (404, "not found")),
        ("GET", "/images/t1/other", (404, "not found")),
        ("GET", "/images/t1/extents/more", (404, "not found")),
        ("OPTIONS", "/images/t1/flush", (404, "not found")),
        ("OPTIONS", "/images/t1/extents", (404, "not found")),
        ("GET", "/images/unknown", (404, "unknown image_id")),
        ("DELETE", "/images/unknown", (404, "unknown image_id")),
        ("POST", "/images/unknown/flush", (404, "unknown image_id")),
    ],
)
def test_what_is_not_there_is_404(
    client: testing.TestClient, method: str, path: str, answer: tuple[int, str]
) -> None:
    assert _error(client.simulate_request(method, path)) == answer


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/images/t1", "GET, HEAD, OPTIONS, PUT, PATCH"),
        ("POST", "/images/t1", "GET, HEAD, OPTIONS, PUT, PATCH"),
        ("POST", "/images/f1", "GET, HEAD, OPTIONS, PUT"),
        ("PUT", "/images/ro", "GET, HEAD, OPTIONS"),
        ("PATCH", "/images/ro", "GET, HEAD, OPTIONS"),
        ("PUT", "/images/t1/extents", "GET"),
        ("HEAD", "/images/t1/extents", "GET"),
        ("GET", "/images/t1/flush", "POST"),
    ],
)
def test_a_method_that_a_resource_lacks_is_405(
    client: testing.TestClient, world: World, method: str, path: str, allow: str
) -> None:
    result = client.simulate_request(method, path)

    assert (result.status_code, result.headers["allow"], world.journal) == (405, allow, [])


@pytest.mark.parametrize(
    ("path", "status", "allow"),
    [
        ("/nowhere", 404, None),
        ("/images/unknown", 404, None),
        ("/images/t1", 405, "GET, HEAD, OPTIONS, PUT, PATCH"),
        ("/images/t1/flush", 405, "POST"),
    ],
)
def test_a_method_nobody_knows_is_one_that_resources_lack(
    path: str, status: int, allow: str | None
) -> None:
    call = Call(app_over(World()), "BREW", path)

    assert (call.status, call.headers.get("allow")) == (status, allow)


@pytest.mark.parametrize("path", ["/images/t1/", "/images/t1/extents/"])
def test_a_trailing_slash_is_tolerated(client: testing.TestClient, path: str) -> None:
    assert client.simulate_get(path).status_code == 200


@pytest.mark.parametrize("code", ["%2F", "%2f", "%5C", "%5c", "%00"])
def test_an_encoded_separator_makes_no_route(code: str) -> None:
    raw = f"/images/t1{code}extents"
    call = Call(app_over(World()), "GET", "/images/t1/extents", RAW_URI=raw)

    assert (call.status, call.read()) == (404, b'{"error":"unknown image_id"}')


def test_an_encoded_separator_in_the_query_is_nobodys_route() -> None:
    app = app_over(World())

    assert Call(app, "GET", "/images/t1", RAW_URI="/images/t1?a=%2F").status == 200


def test_a_server_that_gives_no_raw_path_is_served(world: World) -> None:
    environ: dict[str, Any] = testing.create_environ(path="/images/t1")
    del environ["RAW_URI"]
    statuses: list[str] = []
    pieces = app_over(world)(environ, lambda status, *_: statuses.append(status))

    assert (b"".join(pieces), statuses) == (b"0123456789", [falcon.HTTP_200])
