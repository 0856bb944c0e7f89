# SPDX-License-Identifier: Apache-2.0
"""The application under a plain WSGI server: reading and writing; no zero-copy, no socket."""

from urllib.parse import unquote

import pytest
from falcon import testing

from imageserver.core.errors import BackendError, ImageBusy
from imageserver.images.probing import Asking, WouldWait
from imageserver.web.body import ASKING
from tests.unit.fakes import World
from tests.unit.webapp import COMMON, JSON, Call, app_over, error_of

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

    assert error_of(result) == (416, "range not satisfiable")
    assert result.headers["content-range"] == "bytes */10"
    assert world.journal == ["slot READ", "open READ", "close", "free"]


def test_a_malformed_range_takes_nothing(client: testing.TestClient, world: World) -> None:
    result = client.simulate_get("/images/t1", headers={"Range": "bytes=1-2,4-5"})

    assert error_of(result) == (400, "invalid Range header")
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


@pytest.mark.parametrize("first", ["HEAD", "OPTIONS"])
def test_head_of_a_known_image_needs_no_thread_that_may_wait(
    client: testing.TestClient, world: World, first: str
) -> None:
    with pytest.raises(WouldWait):
        client.simulate_head("/images/t1", extras={ASKING: Asking.ELSEWHERE})
    client.simulate_request(first, "/images/t1")
    head = client.simulate_head("/images/t1", extras={ASKING: Asking.ELSEWHERE})

    assert (head.status_code, head.headers["content-length"]) == (200, "10")
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

    assert error_of(result) == (400, "Content-Length (3) must equal export size (10)")
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
        *("lock", "slot OTHER alone", "open FLUSH"),
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
    told = {"image-dirty-bitmap": "none"} if query == "dirty" else {}
    assert result.headers == COMMON | JSON | told
    assert world.journal[-3:] == ["close", "free", "unlock"]


def test_extents_say_what_is_a_hole_where_the_back_end_does(
    client: testing.TestClient, world: World
) -> None:
    world.batches, world.tells_holes = [[(0, 4, True, True), (4, 6, True, False)]], True

    result = client.simulate_get("/images/t1/extents")

    assert result.content == (
        b'[{"start":0,"length":4,"zero":true,"hole":true},'
        b'{"start":4,"length":6,"zero":true,"hole":false}]'
    )


@pytest.mark.parametrize(
    ("bitmap", "value"),
    [
        ("backup0", "backup0"),
        ("none", "%6Eone"),
        ("None", "None"),
        ("8b0e-11_a.b~c!#$&+^`|", "8b0e-11_a.b~c!#$&+^`|"),
        ('a b%,;="/:', "a%20b%25%2C%3B%3D%22%2F%3A"),
        ("Größe", "Gr%C3%B6%C3%9Fe"),
        ("x\r\nSet-Cookie: y\0", "x%0D%0ASet-Cookie%3A%20y%00"),
    ],
)
def test_dirty_extents_name_their_bitmap_in_one_word(
    client: testing.TestClient,
    world: World,
    caplog: pytest.LogCaptureFixture,
    bitmap: str,
    value: str,
) -> None:
    world.dirty_bitmap = bitmap

    result = client.simulate_get("/images/t1/extents?context=dirty")

    assert result.headers["image-dirty-bitmap"] == value
    assert unquote(value) == bitmap
    assert caplog.records == []


def test_dirty_extents_without_a_bitmap_are_a_warning(
    client: testing.TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    result = client.simulate_get("/images/t1/extents?context=dirty")

    assert result.headers["image-dirty-bitmap"] == "none"
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "WARNING",
        "no dirty bitmap: all counts as dirty",
    )


def test_extents_that_fail_name_no_bitmap(
    client: testing.TestClient, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.fail["extents 0-10 dirty=True"] = BackendError("x")

    result = client.simulate_get("/images/t1/extents?context=dirty")

    assert (result.status_code, "image-dirty-bitmap" in result.headers) == (500, False)
    assert "no dirty bitmap: all counts as dirty" not in caplog.messages


def test_an_empty_image_has_an_empty_list(client: testing.TestClient) -> None:
    assert client.simulate_get("/images/t1/extents").content == b"[]"


def test_another_context_is_refused(client: testing.TestClient, world: World) -> None:
    result = client.simulate_get("/images/t1/extents", params={"context": "used"})

    assert (result.status_code, world.journal) == (400, [])
