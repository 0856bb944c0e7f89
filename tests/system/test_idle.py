# SPDX-License-Identifier: Apache-2.0
"""Idle expiry (docs/api.md), with timeouts of a second and three workers.

Waiting is what takes the time here, so what can be waited for together is: courses of events,
each with transfers of its own, run side by side, and each is one test.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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


class Waited(NamedTuple):
    """What a wait for longer than a second has left of transfers that nobody used in it."""

    active: tuple[int, int]
    """How many registered transfers there were more than before: at first, and afterwards."""
    statuses: dict[str, int]
    """What a GET was answered, by transfer."""


LONGER = (0, -5, 3, 86400, 10**30)


@pytest.fixture(scope="module")
def waited(server: Server) -> Waited:
    """One wait for many transfers: it is what takes the time here."""
    control, one = Control(server.directory / "control"), file_of(server, "one")
    before = control.status()["active_transfers"]
    for name in ("unused", "used-once", "hiding"):
        control.register(name, **one)
    for seconds in LONGER:
        control.register(f"longer{seconds}", **one, idle_timeout_seconds=seconds)
    first = control.status()["active_transfers"] - before
    server.add("hiding", **one)
    server.add("for-ever", **one)
    server.add("for-a-second", **one, idle_timeout_seconds=1)
    server.add("for-a-day", **one, idle_timeout_seconds=0)
    assert server.request("GET", "/images/used-once").status == 200
    time.sleep(EXPIRED)
    longer = [f"longer{seconds}" for seconds in LONGER]
    files = ["for-ever", "for-a-second", "for-a-day"]
    statuses = {name: server.request("GET", f"/images/{name}").status for name in longer + files}
    active = (first, control.status()["active_transfers"] - before)
    for name in longer:
        control.unregister(name)
    return Waited(active, statuses)


def test_a_registered_transfer_that_nobody_used_expires_and_counts_no_more(server, control, waited):
    for method in ("GET", "OPTIONS", "PUT"):
        assert server.request(method, "/images/unused").status == 404
    assert waited.active == (3 + len(LONGER), len(LONGER))
    assert control.status("unused") == {"status": "error", "message": "unknown transfer_id"}


@pytest.mark.usefixtures("waited")
def test_who_has_expired_stays_so_however_often_it_is_asked_for(server):
    for _ in range(10):
        assert server.request("GET", "/images/used-once").refusal == UNKNOWN
        time.sleep(0.05)


@pytest.mark.parametrize("seconds", LONGER, ids=str)
def test_a_registration_may_ask_for_another_timeout(waited, seconds):
    assert waited.statuses[f"longer{seconds}"] == 200


@pytest.mark.usefixtures("waited")
def test_an_expired_registration_still_hides_a_file(server, control):
    assert server.request("GET", "/images/hiding").refusal == UNKNOWN
    control.unregister("hiding")
    assert server.request("GET", "/images/hiding").status == 200


#: Method, rest of the path, status.
REQUESTS = (
    ("GET", "", 200),
    ("HEAD", "", 200),
    ("OPTIONS", "", 200),
    ("DELETE", "", 405),
    ("PATCH", "", 400),
    ("GET", "/extents", 400),
    ("PUT", "/flush", 405),
    ("POST", "/flush", 200),
)


def test_every_request_counts_through_whatever_worker(server, control, one):
    """Each kind is all that its own transfer is used by."""
    kinds = {f"{method}{path.replace('/', '-')}": (method, path) for method, path, _ in REQUESTS}
    expected = dict(zip(kinds, (status for *_, status in REQUESTS), strict=True))
    with one_connection_each(server) as connections:
        for name in kinds:
            control.register(name, **one | {"idle_timeout_seconds": 2})
        for _ in range(2):
            for connection in connections:
                time.sleep(MOMENT)
                assert expected == {
                    name: exchange(connection, method, f"/images/{name}{path}").status
                    for name, (method, path) in kinds.items()
                }
        # The last request was one worker's; all have heard of it.
        for connection in connections:
            for name in kinds:
                assert exchange(connection, "GET", f"/images/{name}").status == 200
        time.sleep(EXPIRED + 1)
        for connection in connections:
            for name in kinds:
                assert exchange(connection, "GET", f"/images/{name}").refusal == UNKNOWN


# Files


def test_a_file_expires_only_if_it_asks_for_that(waited):
    files = {name: waited.statuses[name] for name in ("for-ever", "for-a-second", "for-a-day")}
    assert files == {"for-ever": 200, "for-a-second": 404, "for-a-day": 200}


@pytest.mark.parametrize("value", ["5", 1.5, True, []], ids=str)
def test_a_file_with_a_timeout_of_another_kind_is_unknown_and_logged(server, one, value):
    url = server.add("wrong", **one, idle_timeout_seconds=value)
    assert server.request("GET", url).refusal == UNKNOWN
    assert r"\"idle_timeout_seconds\" must be an integer" in server.log


# Courses of events


class World(NamedTuple):
    """What the courses of events share."""

    server: Server
    control: Control
    one: dict[str, str]
    big: dict[str, str]
    home: Path

    def register(self, name: str, **fields: object) -> str:
        """Register a file; return the path of its image."""
        self.control.register(name, **self.one, **fields)
        return f"/images/{name}"

    def status(self, url: str, method: str = "GET") -> int:
        return self.server.request(method, url).status


COURSES: list[Callable[[World], None]] = []


def meanwhile(course: Callable[[World], None]) -> Callable[[World], None]:
    """Have a course of events run beside the others."""
    COURSES.append(course)
    return course


@pytest.fixture(scope="module")
def running(server: Server, workplace: Path, big: dict[str, str]) -> Iterator[dict[str, Future]]:
    """All courses of events, begun at the same moment."""
    control, one = Control(server.directory / "control"), file_of(server, "one")
    world = World(server, control, one, big, workplace)
    with ThreadPoolExecutor(len(COURSES)) as pool:
        yield {course.__name__: pool.submit(course, world) for course in COURSES}


@meanwhile
def registering_again_begins_anew(world):
    for _ in range(2):
        url = world.register("again")
        assert world.status(url) == 200
        time.sleep(EXPIRED)
        assert world.status(url) == 404
    time.sleep(1)
    world.register("again")
    time.sleep(MOMENT)
    world.register("again")
    time.sleep(0.8)
    assert world.status(url) == 200


@meanwhile
def a_refused_upload_counts(world):
    url = world.register("refused", read_only=True)
    for _ in range(4):
        time.sleep(MOMENT)
        assert world.server.request("PUT", url, b"x").status == 405
    assert world.status(url) == 200


@meanwhile
def other_requests_and_status_do_not_count(world):
    url = world.register("others")
    for _ in range(4):
        time.sleep(MOMENT)
        world.control.status("others")
        world.status(f"{url}-other")
        world.status("/images/")
    assert world.server.request("GET", url).refusal == UNKNOWN


@meanwhile
def a_long_request_keeps_its_transfer_alive_for_all(world):
    world.control.register("long", **world.big)
    with reading(world.server, "/images/long") as client:
        time.sleep(EXPIRED)
        assert world.control.status("long")["requests_in_flight"] == 1
        assert world.status("/images/long", "OPTIONS") == 200
        time.sleep(EXPIRED)
        left = BIG
        while left and (data := client.recv(1 << 20)):
            left -= len(data)
        assert left == 0
    # Its end counts, not its beginning.
    time.sleep(0.6)
    assert world.status("/images/long", "OPTIONS") == 200
    time.sleep(EXPIRED)
    assert world.status("/images/long", "OPTIONS") == 404


@meanwhile
def a_file_in_use_stays_and_then_expires_until_it_changes(world):
    server, fields = world.server, world.one | {"idle_timeout_seconds": 1}
    url = server.add("in-use", **fields)
    for _ in range(5):
        time.sleep(MOMENT)
        assert world.status(url, "OPTIONS") == 200
    time.sleep(EXPIRED)
    for _ in range(5):
        assert server.request("GET", url).refusal == UNKNOWN
    assert (server.config / "in-use").exists()
    server.add("in-use", **fields)
    assert world.status(url) == 200
    time.sleep(EXPIRED)
    assert world.status(url) == 404
    os.utime(server.config / "in-use")
    assert world.status(url) == 200


@meanwhile
def it_works_without_a_control_socket(world):
    home = world.home / "plain"
    home.mkdir()
    with Server(home) as server:
        url = server.add("x", **world.one, idle_timeout_seconds=1)
        for _ in range(4):
            time.sleep(MOMENT)
            assert server.request("GET", url).status == 200
        time.sleep(EXPIRED)
        assert server.request("GET", url).refusal == UNKNOWN


@meanwhile
def time_goes_on_while_the_server_is_down_but_a_restart_is_no_change(world):
    home = world.home / "restarted"
    home.mkdir()
    with Server(home, control_socket=home / "control") as server:
        control = Control(home / "control")
        control.register("short", **world.one, idle_timeout_seconds=1)
        control.register("long", **world.one, idle_timeout_seconds=60)
        server.stop()
        time.sleep(EXPIRED)
        server.start()
        assert server.request("GET", "/images/short").refusal == UNKNOWN
        assert server.request("GET", "/images/long").status == 200
        # What has expired leaves no files behind.
        assert wait_until(lambda: len(list((home / "run" / "registered").iterdir())) == 1)


@pytest.mark.parametrize("course", [course.__name__ for course in COURSES])
def test_of_courses_of_events_side_by_side(running, course):
    running[course].result(60)
