# SPDX-License-Identifier: Apache-2.0
"""Routes, ids and methods: what is there, and what is said of all else."""

from typing import Any

import falcon
import pytest
from falcon import testing

from tests.unit.fakes import World
from tests.unit.webapp import Call, app_over, error_of


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
    assert error_of(client.simulate_request(method, path)) == answer


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
