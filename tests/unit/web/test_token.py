# SPDX-License-Identifier: Apache-2.0
"""A transfer with a token: 401 before anything is looked at, for every route and method."""

import pytest
from falcon import testing

from imageserver.core.entry import Entry
from tests.unit.fakes import World
from tests.unit.webapp import COMMON, JSON, app_over, error_of

RIGHT = {"Authorization": "Bearer s3cr3t"}
WRONG = {"Authorization": "Bearer s3cret"}
REFUSED = (401, "missing or wrong token")


class Entries:
    """``ports.Journal``: keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Entry] = []

    def finished(self, entry: Entry) -> None:
        self.told.append(entry)


@pytest.mark.parametrize("headers", [{}, WRONG, {"Authorization": "Basic s3cr3t"}], ids=str)
@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("OPTIONS", ""),
        ("GET", ""),
        ("GET", "/"),
        ("PUT", ""),
        ("PATCH", ""),
        ("DELETE", ""),
        ("GET", "/extents"),
        ("POST", "/flush"),
        ("GET", "/flush"),
    ],
)
def test_without_its_token_a_transfer_is_401_and_nothing_is_opened(
    client: testing.TestClient, world: World, method: str, route: str, headers: dict[str, str]
) -> None:
    body = "" if method in {"GET", "OPTIONS"} else "0123456789"
    result = client.simulate_request(method, f"/images/tok{route}", headers=headers, body=body)

    assert error_of(result) == REFUSED
    length = str(len(result.content))
    assert result.headers == COMMON | JSON | {
        "www-authenticate": "Bearer",
        "content-length": length,
    }
    assert world.journal == ["visit", "leave"]  # a refused request counts as use


def test_head_is_401_too(client: testing.TestClient, world: World) -> None:
    result = client.simulate_head("/images/tok")

    assert (result.status_code, result.content) == (401, b"")
    assert result.headers["www-authenticate"] == "Bearer"
    assert world.journal == ["visit", "leave"]


def test_with_its_token_a_transfer_is_served(client: testing.TestClient) -> None:
    assert client.simulate_get("/images/tok", headers=RIGHT).content == b"0123456789"
    assert client.simulate_options("/images/tok", headers=RIGHT).status_code == 200
    assert client.simulate_head("/images/tok", headers=RIGHT).status_code == 200


def test_a_transfer_without_a_token_takes_no_notice_of_one(client: testing.TestClient) -> None:
    assert client.simulate_get("/images/t1", headers=WRONG).content == b"0123456789"


@pytest.mark.parametrize(
    ("method", "path", "headers", "expected"),
    [
        ("OPTIONS", "/images/tok/flush", {}, (404, "not found")),
        ("GET", "/images/nobody", {}, (404, "unknown image_id")),
        ("DELETE", "/images/tok", {}, REFUSED),
        ("DELETE", "/images/tok", RIGHT, (405, "method not allowed")),
        ("PUT", "/images/tok?flush=x", {}, REFUSED),
        ("PUT", "/images/tok?flush=x", RIGHT, (400, 'invalid "flush": it must be y or n')),
    ],
)
def test_route_and_id_are_checked_before_and_the_rest_after_it(
    client: testing.TestClient,
    method: str,
    path: str,
    headers: dict[str, str],
    expected: tuple[int, str],
) -> None:
    assert error_of(client.simulate_request(method, path, headers=headers)) == expected


def test_what_is_told_of_a_request_has_no_token() -> None:
    entries = Entries()
    client = testing.TestClient(app_over(World(), entries))
    for headers in (RIGHT, WRONG):
        client.simulate_get("/images/tok", headers=headers)

    assert [(entry.status, entry.error) for entry in entries.told] == [
        (200, ""),
        (401, "Unauthorized"),
    ]
    assert "s3cr" not in str(entries.told)
