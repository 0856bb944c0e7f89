# SPDX-License-Identifier: Apache-2.0
"""Scripts of other web sites: which may ask, what preflights are told, and what is not sent."""

import pytest
from falcon import testing

from tests.unit.fakes import World
from tests.unit.webapp import app_over, error_of

ENGINE = "https://engine.example"
FROM_ENGINE = {"Origin": ENGINE}
ASKS = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "authorization"}
ALLOWED = "access-control-allow-origin"


def client_of(*origins: str) -> testing.TestClient:
    return testing.TestClient(app_over(World(), origins=origins))


def cors_of(result: testing.Result) -> dict[str, str]:
    """Return what an answer says to browsers."""
    names = ("access-control-", "vary")
    return {k: v for k, v in result.headers.items() if k.startswith(names)}


@pytest.mark.parametrize("path", ["/images/t1", "/images/tok", "/images/*", "/nowhere"])
def test_nothing_is_sent_where_no_origin_is_set(path: str) -> None:
    result = client_of().simulate_options(path, headers=FROM_ENGINE | ASKS)

    assert cors_of(result).keys() == {"access-control-allow-methods"}
    assert result.status_code != 204


@pytest.mark.parametrize(
    ("origins", "sent", "allowed"),
    [
        (("*",), ENGINE, "*"),
        (("*",), "null", "*"),
        ((ENGINE, "http://b"), ENGINE, ENGINE),
        ((ENGINE, "http://b"), "http://b", "http://b"),
        ((ENGINE,), "http://engine.example", None),
        ((ENGINE,), f"{ENGINE}:8443", None),
        ((ENGINE,), f"{ENGINE}.evil.example", None),
        ((ENGINE,), "null", None),
        ((ENGINE,), "*", None),
        (("*",), None, None),
        ((ENGINE,), None, None),
    ],
)
def test_an_origin_may_ask_where_it_is_named(
    origins: tuple[str, ...], sent: str | None, allowed: str | None
) -> None:
    headers = {"Origin": sent} if sent else {}
    result = client_of(*origins).simulate_get("/images/t1", headers=headers)

    assert (result.status_code, result.headers.get(ALLOWED)) == (200, allowed)
    assert result.headers["vary"] == "Origin"
    exposed = result.headers.get("access-control-expose-headers")
    assert exposed == ("*" if allowed else None)


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/images/t1", "GET, PUT, PATCH, OPTIONS"),
        ("/images/f1", "GET, PUT, POST, OPTIONS"),
        ("/images/*", "GET, PUT, PATCH, POST, OPTIONS"),
    ],
)
def test_a_preflight_is_told_what_may_be_asked(path: str, methods: str) -> None:
    result = client_of(ENGINE).simulate_options(path, headers=FROM_ENGINE | ASKS)

    assert result.status_code == 200
    assert cors_of(result) == {
        ALLOWED: ENGINE,
        "access-control-allow-methods": methods,
        "access-control-allow-headers": "*, Authorization",
        "access-control-max-age": "86400",
        "vary": "Origin",
    }


def test_a_preflight_of_a_transfer_with_a_token_learns_nothing_of_the_image() -> None:
    world = World()
    client = testing.TestClient(app_over(world, origins=(ENGINE,)))
    result = client.simulate_options("/images/tok", headers=FROM_ENGINE | ASKS)

    assert (result.status_code, result.content) == (204, b"")
    assert result.headers["access-control-allow-methods"] == "GET, PUT, PATCH, POST, OPTIONS"
    assert result.headers["access-control-allow-headers"] == "*, Authorization"
    assert "allow" not in result.headers
    assert world.journal == ["visit", "leave"]


@pytest.mark.parametrize("name", ["t1", "tok"])
@pytest.mark.parametrize("route", ["extents", "flush"])
def test_a_script_may_send_a_token_to_the_routes_of_an_image(name: str, route: str) -> None:
    world = World()
    client = testing.TestClient(app_over(world, origins=(ENGINE,)))
    path = f"/images/{name}/{route}"
    result = client.simulate_options(path, headers=FROM_ENGINE | ASKS)

    assert (result.status_code, result.headers[ALLOWED]) == (204, ENGINE)
    assert result.headers["access-control-allow-methods"] == "GET, PUT, PATCH, POST, OPTIONS"
    assert set(world.journal) <= {"visit", "leave"}
    for headers in (FROM_ENGINE, ASKS, ASKS | {"Origin": "https://evil.example"}):
        refused = client.simulate_options(path, headers=headers)
        assert error_of(refused) == (404, "not found")


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("OPTIONS", FROM_ENGINE),
        ("OPTIONS", ASKS),
        ("OPTIONS", ASKS | {"Origin": "https://evil.example"}),
        ("GET", FROM_ENGINE | ASKS),
    ],
)
def test_what_is_no_preflight_of_an_origin_that_may_ask_needs_the_token(
    method: str, headers: dict[str, str]
) -> None:
    result = client_of(ENGINE).simulate_request(method, "/images/tok", headers=headers)

    assert error_of(result) == (401, "missing or wrong token")


@pytest.mark.parametrize("path", ["/images/tok", "/images/nobody", "/images/t1?close=x"])
def test_a_script_may_read_a_refusal(path: str) -> None:
    result = client_of("*").simulate_get(path, headers=FROM_ENGINE)

    assert result.status_code >= 400
    assert result.headers[ALLOWED] == "*"
