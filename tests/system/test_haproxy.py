# SPDX-License-Identifier: Apache-2.0
"""conf/haproxy.cfg, run by haproxy before two servers: routing and draining.

The two servers have the same ids, but each its own files, which say whose they are.
"""

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.balancing import BIG, HOSTS, Balancer, check, in_state, owner, two_hosts
from tests.system.clients import putting, read_answer, reading
from tests.system.harness import ROOT, Server, wait_until

MIB = 1 << 20
IDS = [f"image-{number}" for number in range(40)]


@pytest.fixture(scope="module")
def servers(workplace: Path) -> Iterator[list[Server]]:
    """Two servers that know the same ids: a small file, a big one, and one with a space."""
    with two_hosts(workplace, *IDS, "of it") as running:
        yield running


@pytest.fixture(scope="module")
def mapped(workplace: Path, servers: list[Server]) -> Iterator[Balancer]:
    """Each transfer is on the host that the map names; at start it names one."""
    text = "# as in conf/haproxy.map\nimage-0 kvm2\n"
    ports = [server.port for server in servers]
    with Balancer(workplace / "mapped", *ports, routing="map", map_text=text) as running:
        yield running


@pytest.fixture(scope="module")
def shared(workplace: Path, servers: list[Server]) -> Iterator[Balancer]:
    """Each transfer is on both hosts."""
    ports = [server.port for server in servers]
    with Balancer(workplace / "shared", *ports, routing="shared") as running:
        yield running


@pytest.mark.parametrize("routing", [{}, {"LB_ROUTING": "shared"}], ids=["map", "shared"])
def test_the_file_is_valid_as_it_stands(routing):
    done = check(**routing)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Configuration file is valid\n", "")


def test_another_routing_is_refused():
    done = check(LB_ROUTING="Map")
    assert done.returncode == 1
    assert "LB_ROUTING must be map or shared" in done.stderr


def test_states_of_hosts_are_taken_over_from_a_saved_file(workplace, servers, mapped):
    with in_state(mapped, "kvm1", "drain"):
        (workplace / "state").write_text(mapped.admin("show servers state") + "\n\n")
    ports = [server.port for server in servers]
    successor = Balancer(workplace / "successor", *ports, routing="map")
    successor.env["LB_STATE"] = str(workplace / "state")
    with successor:
        assert {host: successor.status(host) for host in HOSTS} == {"kvm1": "DRAIN", "kvm2": "UP"}


@pytest.mark.parametrize("routing", ["mapped", "shared"])
def test_both_hosts_are_probed_and_up(request, routing):
    hosts = request.getfixturevalue(routing).hosts()
    seen = {name: (host["status"], host["check_code"]) for name, host in hosts.items()}
    assert seen == {"kvm1": ("UP", "200"), "kvm2": ("UP", "200")}


@pytest.mark.parametrize("path", ["/images/*", "*"])
def test_who_probes_the_balancer_is_answered_by_a_host(mapped, servers, path):
    answer = mapped.request("OPTIONS", path)
    assert (answer.status, answer.body) == (200, servers[0].request("OPTIONS", path).body)


def test_the_map_is_read_at_start(mapped):
    assert owner(mapped, "image-0") == "kvm2"


def test_the_map_changes_at_run_time_for_the_next_request(mapped):
    name = "image-1"
    unknown = (404, "unknown image_id")
    assert mapped.request("GET", f"/images/{name}").refusal == unknown
    mapped.route(name, "kvm1")
    with contextlib.closing(mapped.connect()) as connection:
        for host in ("kvm1", "kvm2", "kvm1"):
            assert mapped.admin(f"set map {mapped.map} {name} {host}") == ""
            connection.request("GET", f"/images/{name}")  # on a connection that is kept alive
            assert connection.getresponse().read() == host.encode()
    assert mapped.admin(f"del map {mapped.map} {name}") == ""
    assert mapped.request("PUT", f"/images/{name}", b"x").refusal == unknown


def test_an_id_is_found_however_it_is_spelt(mapped):
    mapped.route("image-2", "kvm2")
    mapped.route(r"of\ it", "kvm1")
    assert owner(mapped, "%69mage%2d2/") == "kvm2"
    assert owner(mapped, "of%20it") == "kvm1"
    assert mapped.request("GET", "/images/image-2%zz").refusal == (404, "unknown image_id")


def test_a_host_that_is_not_there_is_an_error_of_its_own(mapped):
    mapped.route("image-3", "kvm9")
    assert mapped.request("GET", "/images/image-3").refusal == (503, "host unknown")


def test_with_shared_storage_each_image_has_one_host_and_each_host_has_images(shared):
    owners = {name: owner(shared, name) for name in IDS}
    assert min(list(owners.values()).count(host) for host in HOSTS) >= 8
    for name, host in owners.items():
        spelt = name.replace("a", "%61")
        assert [owner(shared, way) for way in (name, f"{name}/", spelt)] == [host] * 3
        part = shared.request("GET", f"/images/{name}?x=y", headers={"Range": "bytes=0-3"})
        assert (part.status, part.body.decode()) == (206, host)


def test_another_balancer_finds_the_same_hosts(workplace, servers, shared):
    ports = [server.port for server in servers]
    with Balancer(workplace / "other", *ports, routing="shared") as other:
        assert [owner(other, name) for name in IDS] == [owner(shared, name) for name in IDS]


def read_rest(sock: socket.socket) -> int:
    """Return how many bytes still come of what ``reading`` began."""
    left = BIG
    with contextlib.suppress(ConnectionError):
        while left and (piece := sock.recv(MIB)):
            left -= len(piece)
    return BIG - left


def test_a_drained_host_of_the_map_finishes_and_gets_nothing_new(mapped, servers):
    mapped.route("big", "kvm1")
    mapped.route("image-4", "kvm1")
    with reading(mapped, "/images/big") as sock, putting(mapped, "/images/image-4", 4, b"kv") as up:
        with in_state(mapped, "kvm1", "drain"):
            answer = mapped.request("GET", "/images/image-4")
            assert answer.refusal == (503, "host unavailable")
            assert answer.headers["Retry-After"] == "1"
            assert owner(mapped, "image-0") == "kvm2"
            assert servers[0].holders() == ["READ big", "WRITE image-4"]
            up[0].sendall(b"m1")
            assert read_answer(up[1]).status == 200
            assert read_rest(sock) == BIG
            wait_until(lambda: servers[0].holders() == [])
        assert owner(mapped, "image-4") == "kvm1"


def test_a_drained_host_of_shared_storage_keeps_images_in_use_and_gets_no_others(
    workplace, servers, shared
):
    known = {name: owner(shared, name) for name in IDS}
    for server in servers:
        for name in (f"new-{image}" for image in IDS):
            server.add(name, backend="file", file=str(server.directory / "small"))
    with reading(shared, "/images/big") as sock:
        using = owner(shared, "big")
        with in_state(shared, using, "drain"):
            assert {name: owner(shared, name) for name in IDS} == known
            assert using not in {owner(shared, f"new-{image}") for image in IDS}
            assert read_rest(sock) == BIG
    # Back again, it does not take away what others began.
    assert using not in {owner(shared, f"new-{image}") for image in IDS}


@pytest.mark.parametrize(("routing", "finishes"), [("mapped", True), ("shared", False)])
def test_maintenance_lets_requests_finish_or_cuts_what_would_move(
    request, servers, routing, finishes
):
    balancer = request.getfixturevalue(routing)
    if routing == "mapped":
        balancer.admin(f"del map {balancer.map} big")
        balancer.route("big", "kvm1")
    with (
        reading(balancer, "/images/big") as sock,
        in_state(balancer, owner(balancer, "big"), "maint"),
    ):
        assert (read_rest(sock) == BIG) == finishes
        assert balancer.request("GET", "/images/big").status == (503 if finishes else 200)


def documented() -> list[str]:
    """Return what docs/load-balancing.md says to the admin socket, in its order."""
    text = (ROOT / "docs" / "load-balancing.md").read_text(encoding="utf-8")
    return re.findall(r'^echo "([^"]+)" \| socat - /run/haproxy/admin.sock', text, re.MULTILINE)


def test_the_documented_commands_do_what_they_say(mapped):
    known = {"set": "", "add": "", "del": "", "show": r"0x|#|1\n"}
    commands = [command.replace("haproxy.map", str(mapped.map)) for command in documented()]
    assert len(commands) == 9
    for command in commands:
        answer = mapped.admin(command)
        expected = known[command.split()[0]]
        assert re.match(expected, answer) if expected else answer == "", (command, answer)
    wait_until(lambda: mapped.status("kvm1") == "UP")
