# SPDX-License-Identifier: Apache-2.0
"""A host behind haproxy dies under load: who notices, for how long, and what is not done twice."""

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.system.balancing import BIG, HOSTS, Balancer, kill, owner, two_hosts
from tests.system.clients import putting, read_answer, reading
from tests.system.harness import Server, wait_until

IDS = [f"image-{number}" for number in range(12)]
#: inter and fastinter of conf/haproxy.cfg, thrice, and what a busy machine adds.
CHECK_SECONDS = 8


class Asked(NamedTuple):
    """One request of the load: when it began, what it asked for, what came."""

    began: float
    name: str
    status: int
    host: str


class Load(threading.Thread):
    """A client that asks for one small image after the other, until it is told to stop."""

    def __init__(self, balancer: Balancer) -> None:
        super().__init__(daemon=True)
        self.balancer = balancer
        self.asked: list[Asked] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            for name in IDS:
                self.asked.append(self._ask(name))

    def _ask(self, name: str) -> Asked:
        began = time.monotonic()
        try:
            answer = self.balancer.request("GET", f"/images/{name}")
        except (OSError, http.client.HTTPException):
            return Asked(began, name, 0, "")
        return Asked(began, name, answer.status, answer.body.decode())


@contextlib.contextmanager
def loading(balancer: Balancer, clients: int) -> Iterator[list[Load]]:
    loads = [Load(balancer) for _ in range(clients)]
    for load in loads:
        load.start()
    try:
        yield loads
    finally:
        for load in loads:
            load.stopped.set()
        for load in loads:
            load.join(30)


@pytest.fixture
def servers(workplace: Path) -> Iterator[dict[str, Server]]:
    """Two servers with several big images, and several to write."""
    with two_hosts(workplace, *IDS) as running:
        for server in running:
            (server.directory / "target").write_text(server.directory.name)
            for kind in ("big", "target"):
                for number in range(16):
                    path = str(server.directory / kind)
                    server.add(f"{kind}-{number}", backend="file", file=path)
        yield dict(zip(HOSTS, running, strict=True))


def one_of(balancer: Balancer, host: str, kind: str) -> str:
    """Return the path of an image of this kind that goes to this host."""
    names = [f"{kind}-{number}" for number in range(16)]
    return next(f"/images/{name}" for name in names if owner(balancer, name) == host)


def test_a_dead_host_costs_its_requests_in_flight_and_the_others_nothing(workplace, servers):
    victim, survivor = HOSTS
    ports = [server.port for server in servers.values()]
    with Balancer(workplace / "balancer", *ports, routing="shared") as balancer:
        big = one_of(balancer, victim, "big")
        mine, others = (one_of(balancer, host, "target") for host in (victim, survivor))
        with (
            reading(balancer, big) as reader,
            putting(balancer, mine, 3, b"n") as (_, lost),
            loading(balancer, 3) as loads,
        ):
            wait_until(lambda: all(len(load.asked) > 3 * len(IDS) for load in loads))
            died = time.monotonic()
            kill(servers[victim])
            assert received(reader) < BIG
            assert lost_answer(lost) in {0, 502, 503}
            wait_until(lambda: balancer.status(victim) == "DOWN", CHECK_SECONDS)
            down = time.monotonic()
            with putting(balancer, others, 3, b"new") as (_, stream):
                assert read_answer(stream).status == 200
            wait_until(lambda: all(_rounds_since(load, down) for load in loads), 20)
        asked = [one for load in loads for one in load.asked]
        before = {one.name: one.host for one in asked if one.began < died and one.status == 200}
        assert set(before.values()) == set(HOSTS)
        for one in asked:
            if before[one.name] == survivor or one.began > down:
                assert (one.status, one.host) in {(200, victim), (200, survivor)}, one
            else:
                assert one.status in {0, 200, 502, 503}, one
        late = [one for one in asked if one.began > down]
        assert {one.host for one in late} == {survivor}
        # What the client began to write to the dead host was not sent to the other.
        assert (servers[survivor].directory / "target").read_text() == "new"
        assert (servers[victim].directory / "target").read_text() == victim


def test_a_dead_host_of_the_map_is_missed_and_found_again(workplace, servers):
    text = "image-0 kvm1\nimage-1 kvm2\n"
    ports = [server.port for server in servers.values()]
    with Balancer(workplace / "balancer", *ports, routing="map", map_text=text) as balancer:
        kill(servers["kvm1"])
        wait_until(lambda: balancer.status("kvm1") == "DOWN", CHECK_SECONDS)
        assert balancer.request("GET", "/images/image-0").refusal == (503, "host unavailable")
        assert balancer.request("GET", "/images/image-1").body == b"kvm2"
        assert balancer.request("OPTIONS", "/images/*").status == 200
        servers["kvm1"].start()
        wait_until(lambda: balancer.status("kvm1") == "UP", CHECK_SECONDS)
        assert balancer.request("GET", "/images/image-0").body == b"kvm1"


def received(sock) -> int:
    total = 0
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 20):
            total += len(piece)
    return total


def lost_answer(stream) -> int:
    """Return the status of an answer, 0 where the connection ends without."""
    try:
        return int((stream.readline() or b"- 0").split()[1])
    except ConnectionError:
        return 0


def _rounds_since(load: Load, when: float) -> bool:
    """Tell whether a client has asked for every image since then."""
    return {one.name for one in load.asked if one.began > when} == set(IDS)
