# SPDX-License-Identifier: Apache-2.0
"""Idle expiry (docs/api.md), with timeouts of a second and three workers."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.answers import UNKNOWN
from tests.system.clients import one_connection_each, reading
from tests.system.controlling import Control, controlled, file_of
from tests.system.disks import BIG
from tests.system.harness import Server, exchange, wait_until

#: Longer than the timeout of a second, by less than a second.
EXPIRED = 1.4
#: Several of these make up a timeout.
MOMENT = 0.4


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with controlled(workplace, idle_timeout=1) as running:
        yield running


@pytest.fixture
def one(server: Server) -> dict[str, str]:
    return file_of(server, "one")


def test_a_registered_transfer_that_nobody_used_expires_and_counts_no_more(
    server, control, one, name
):
    before = control.status()["active_transfers"]
    assert control.register(name, **one)["active_transfers"] == before + 1
    time.sleep(EXPIRED)
    for method in ("GET", "OPTIONS", "PUT"):
        assert server.request(method, f"/images/{name}").status == 404
    assert control.status()["active_transfers"] == before
    assert control.status(name) == {"status": "error", "message": "unknown transfer_id"}


def test_who_has_expired_stays_so_however_often_it_is_asked_for(server, control, one, name):
    control.register(name, **one)
    assert server.request("GET", f"/images/{name}").status == 200
    time.sleep(EXPIRED)
    for _ in range(10):
        assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
        time.sleep(0.05)


def test_registering_again_begins_anew(server, control, one, name):
    for _ in range(2):
        control.register(name, **one)
        assert server.request("GET", f"/images/{name}").status == 200
        time.sleep(EXPIRED)
        assert server.request("GET", f"/images/{name}").status == 404
    time.sleep(1)
    control.register(name, **one)
    time.sleep(MOMENT)
    control.register(name, **one)
    time.sleep(0.8)
    assert server.request("GET", f"/images/{name}").status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "", 200),
        ("HEAD", "", 200),
        ("OPTIONS", "", 200),
        ("DELETE", "", 405),
        ("PATCH", "", 400),
        ("GET", "/extents", 400),
        ("PUT", "/flush", 405),
        ("POST", "/flush", 200),
    ],
)
def test_every_request_counts_through_whatever_worker(server, control, one, method, path, status):
    name = f"used-{method}{path.replace('/', '-')}"
    control.register(name, **one)
    with one_connection_each(server) as connections:
        control.register(name, **one)
        for _ in range(2):
            for connection in connections:
                time.sleep(MOMENT)
                answer = exchange(connection, method, f"/images/{name}{path}")
                assert answer.status == status
        # The last request was one worker's; all have heard of it.
        for connection in connections:
            assert exchange(connection, "GET", f"/images/{name}").status == 200
        time.sleep(EXPIRED)
        for connection in connections:
            assert exchange(connection, "GET", f"/images/{name}").refusal == UNKNOWN


def test_a_refused_upload_counts(server, control, one, name):
    control.register(name, **one, read_only=True)
    for _ in range(4):
        time.sleep(MOMENT)
        assert server.request("PUT", f"/images/{name}", b"x").status == 405
    assert server.request("GET", f"/images/{name}").status == 200


def test_other_requests_and_status_do_not_count(server, control, one, name):
    control.register(name, **one)
    for _ in range(4):
        time.sleep(MOMENT)
        control.status(name)
        server.request("GET", f"/images/{name}-other")
        server.request("GET", "/images/")
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN


def test_a_long_request_keeps_its_transfer_alive_for_all(server, control, big, name):
    control.register(name, **big)
    with reading(server, f"/images/{name}") as client:
        time.sleep(3)
        assert control.status(name)["requests_in_flight"] == 1
        assert server.request("OPTIONS", f"/images/{name}").status == 200
        time.sleep(2)
        left = BIG
        while left and (data := client.recv(1 << 20)):
            left -= len(data)
        assert left == 0
    # Its end counts, not its beginning.
    time.sleep(0.6)
    assert server.request("OPTIONS", f"/images/{name}").status == 200
    time.sleep(EXPIRED)
    assert server.request("OPTIONS", f"/images/{name}").status == 404


@pytest.mark.parametrize("seconds", [0, -5, 3, 86400, 10**30], ids=str)
def test_a_registration_may_ask_for_another_timeout(server, control, one, seconds):
    control.register("longer", **one, idle_timeout_seconds=seconds)
    time.sleep(EXPIRED)
    assert server.request("GET", "/images/longer").status == 200
    control.unregister("longer")


def test_an_expired_registration_still_hides_a_file(server, control, one, name):
    server.add(name, **one)
    control.register(name, **one)
    time.sleep(EXPIRED)
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
    control.unregister(name)
    assert server.request("GET", f"/images/{name}").status == 200


# Files


def test_a_file_expires_only_if_it_asks_for_that(server, one):
    server.add("for-ever", **one)
    server.add("for-a-second", **one, idle_timeout_seconds=1)
    server.add("for-a-day", **one, idle_timeout_seconds=0)
    time.sleep(EXPIRED)
    statuses = [
        server.request("GET", f"/images/{name}").status
        for name in ("for-ever", "for-a-second", "for-a-day")
    ]
    assert statuses == [200, 404, 200]


def test_a_file_in_use_stays_and_then_expires_until_it_changes(server, one, name):
    url = server.add(name, **one, idle_timeout_seconds=1)
    for _ in range(5):
        time.sleep(MOMENT)
        assert server.request("OPTIONS", url).status == 200
    time.sleep(EXPIRED)
    for _ in range(5):
        assert server.request("GET", url).refusal == UNKNOWN
    assert (server.config / name).exists()
    server.add(name, **one, idle_timeout_seconds=1)
    assert server.request("GET", url).status == 200
    time.sleep(EXPIRED)
    assert server.request("GET", url).status == 404
    os.utime(server.config / name)
    assert server.request("GET", url).status == 200


@pytest.mark.parametrize("value", ["5", 1.5, True, []], ids=str)
def test_a_file_with_a_timeout_of_another_kind_is_unknown_and_logged(server, one, value):
    url = server.add("wrong", **one, idle_timeout_seconds=value)
    assert server.request("GET", url).refusal == UNKNOWN
    assert '"idle_timeout_seconds" must be an integer' in server.log


def test_it_works_without_a_control_socket(workplace, one):
    home = workplace / "plain"
    home.mkdir()
    with Server(home) as server:
        url = server.add("x", **one, idle_timeout_seconds=1)
        for _ in range(4):
            time.sleep(MOMENT)
            assert server.request("GET", url).status == 200
        time.sleep(EXPIRED)
        assert server.request("GET", url).refusal == UNKNOWN


def test_time_goes_on_while_the_server_is_down_but_a_restart_is_no_change(workplace, one):
    home = workplace / "restarted"
    home.mkdir()
    with Server(home, control_socket=home / "control") as server:
        control = Control(home / "control")
        control.register("short", **one, idle_timeout_seconds=1)
        control.register("long", **one, idle_timeout_seconds=60)
        server.stop()
        time.sleep(EXPIRED)
        server.start()
        assert server.request("GET", "/images/short").refusal == UNKNOWN
        assert server.request("GET", "/images/long").status == 200
        # What has expired leaves no files behind.
        assert wait_until(lambda: len(list((home / "run" / "registered").iterdir())) == 1)
