# SPDX-License-Identifier: Apache-2.0
"""Who may ask the admin listener: nobody on behalf of another web site, or under a foreign name."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from falcon import testing

from imageserver.core.entry import Exposition
from imageserver.core.recent import Recently
from imageserver.web.admin_app import AdminSources, create_admin_app
from imageserver.web.admin_guard import knows
from imageserver.web.admin_status import Books

LIMITS = dict.fromkeys(
    ("max_readers", "max_writers", "max_readers_per_image", "max_writers_per_image")
)
NAMES = {"images1"}


def client(hosts: set[str] | None) -> testing.TestClient:
    table = SimpleNamespace(living=lambda *_: [])
    books = Books(table, LIMITS, lambda: Recently((), ()), dict, dict)
    none = SimpleNamespace()
    sources = AdminSources(books, none, none, {}, lambda: Exposition(b"", "text/plain"))
    return testing.TestClient(create_admin_app(sources, hosts, full_ids=False))


def ask(headers: Mapping[str, str], path: str = "/status", hosts: Any = NAMES) -> testing.Result:
    return client(hosts).simulate_get(path, headers={"Host": "127.0.0.1:54324", **headers})


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "10.0.0.5:54324", "[::1]:54324", "localhost:54324", "a.localhost"),
        *("images1", "IMAGES1:54324", "images1."),
    ],
)
def test_an_address_and_a_name_of_ours_may_be_asked(host: str):
    assert ask({"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:54324", "images1.evil.example", "127.0.0.1.evil.example"),
        *("localhost.evil.example", "notlocalhost", "x@127.0.0.1", "[::1", "1.2.3", ":54324"),
    ],
)
def test_a_name_that_leads_here_by_dns_may_not(host: str):
    answer = ask({"Host": host})
    assert (answer.status_code, answer.json) == (421, {"error": "unknown host"})
    assert not knows(host, NAMES)


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/status", "/nothing"])
def test_the_path_does_not_matter(path: str):
    assert ask({"Host": "evil.example"}, path).status_code == 421


def test_over_a_unix_socket_which_no_browser_reaches_any_name_will_do():
    assert ask({"Host": "evil.example"}, hosts=None).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Origin": "http://evil.example"}, id="origin"),
        pytest.param({"Origin": "null"}, id="sandboxed"),
        pytest.param({"Origin": "http://127.0.0.1:80"}, id="other-port"),
        pytest.param({"Sec-Fetch-Site": "cross-site"}, id="script"),
        pytest.param({"Sec-Fetch-Site": "same-site"}, id="other-port-of-this-host"),
        pytest.param(
            {
                "Sec-Fetch-Site": "cross-site",
                "Sec-Fetch-Mode": "navigate",
                "Sec-Fetch-Dest": "iframe",
            },
            id="frame",
        ),
        pytest.param(
            {
                "Sec-Fetch-Site": "cross-site",
                "Sec-Fetch-Mode": "navigate",
                "Sec-Fetch-Dest": "document",
            },
            id="link-to-status",
        ),
    ],
)
def test_what_another_site_asks_for_is_refused(headers: dict[str, str]):
    answer = ask(headers)
    assert (answer.status_code, answer.json) == (403, {"error": "cross-origin request"})


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="curl"),
        pytest.param({"Sec-Fetch-Site": "none"}, id="typed-in"),
        pytest.param({"Sec-Fetch-Site": "same-origin"}, id="own"),
        pytest.param({"Origin": "http://127.0.0.1:54324"}, id="own-origin"),
    ],
)
def test_what_nobody_else_asks_for_is_answered_and_for_no_other_site(headers: dict[str, str]):
    answer = ask(headers)
    assert answer.status_code == 200
    told = {name.lower(): value for name, value in answer.headers.items()}
    assert not [name for name in told if name.startswith("access-control-")]
    assert told["cross-origin-resource-policy"] == "same-origin"
    assert (told["x-content-type-options"], told["x-frame-options"]) == ("nosniff", "DENY")
    assert (told["referrer-policy"], told["cache-control"]) == ("no-referrer", "no-store")
