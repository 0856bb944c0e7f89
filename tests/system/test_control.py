# SPDX-License-Identifier: Apache-2.0
"""The control socket (docs/api.md), over three workers: register, unregister, status."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.answers import UNKNOWN
from tests.system.clients import one_connection_each, putting, reading
from tests.system.controlling import controlled, file_of
from tests.system.disks import BIG
from tests.system.harness import Server, exchange, wait_until


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with controlled(workplace) as running:
        yield running


def test_a_registered_transfer_is_served_until_it_is_unregistered(server, control, name):
    before = control.status()["active_transfers"]
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
    registered = control.register(name, **file_of(server, "one"))
    assert registered == {"status": "ok", "active_transfers": before + 1}
    assert server.request("GET", f"/images/{name}").body == b"one"
    assert control.status() == registered
    assert control.unregister(name) == {"status": "ok", "active_transfers": before}
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
    assert control.unregister(name) == {"status": "ok", "active_transfers": before}


def test_every_worker_sees_each_change_in_its_next_request(server, control, name):
    path = f"/images/{name}"
    with one_connection_each(server) as connections:
        for _ in range(5):
            for content in ("one", "two"):
                control.register(name, **file_of(server, content))
                bodies = [exchange(each, "GET", path).body for each in connections]
                assert bodies == [content.encode()] * 3
            control.unregister(name)
            assert [exchange(each, "GET", path).refusal for each in connections] == [UNKNOWN] * 3


def test_a_registration_that_has_settled_and_may_be_cached_is_replaced_as_well(
    server, control, name
):
    path = f"/images/{name}"
    control.register(name, **file_of(server, "one"))
    time.sleep(2.2)  # files younger than 2 s are not cached
    with one_connection_each(server) as connections:
        for content in (b"one", b"one"):
            assert [exchange(each, "GET", path).body for each in connections] == [content] * 3
        control.register(name, **file_of(server, "two"))
        assert [exchange(each, "GET", path).body for each in connections] == [b"two"] * 3
    control.unregister(name)


def test_ten_threads_register_and_unregister_two_hundred_transfers(server, control):
    before = control.status()["active_transfers"]
    names = [f"many-{number}" for number in range(200)]
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda n: control.register(n, **file_of(server, "one")), names))
        assert {answer["status"] for answer in answers} == {"ok"}
        assert max(answer["active_transfers"] for answer in answers) == before + 200
        assert control.status()["active_transfers"] == before + 200
        got = threads.map(lambda n: server.request("GET", f"/images/{n}").body, names)
        assert list(got) == [b"one"] * 200
        answers = list(threads.map(control.unregister, names))
        assert {answer["status"] for answer in answers} == {"ok"}
        gone = threads.map(lambda n: server.request("GET", f"/images/{n}").status, names)
        assert list(gone) == [404] * 200
    assert control.status()["active_transfers"] == before


def test_ten_threads_fight_over_one_id_and_the_last_word_counts(server, control, name):
    def fight(content: str) -> None:
        for _ in range(10):
            assert control.register(name, **file_of(server, content))["status"] == "ok"
            assert control.unregister(name)["status"] == "ok"

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(fight, ["one", "two"] * 5))
    assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
    control.register(name, **file_of(server, "two"))
    assert server.request("GET", f"/images/{name}").body == b"two"
    control.unregister(name)


def test_what_is_registered_need_not_exist_yet(server, control, name):
    late = server.directory / "late"
    assert control.register(name, backend="file", file=str(late))["status"] == "ok"
    assert server.request("GET", f"/images/{name}").refusal == (500, "failed to access file")
    late.write_bytes(b"late")
    assert server.request("GET", f"/images/{name}").body == b"late"
    control.unregister(name)
    socket_ = {"socket": str(server.directory / "late.sock")}
    assert control.register(name, **socket_)["status"] == "ok"
    assert server.request("GET", f"/images/{name}").refusal == (500, "backend error")
    control.unregister(name)


def test_a_registration_wins_over_a_file_and_leaves_it_alone(server, control, name):
    path = server.add(name, **file_of(server, "one"))
    assert server.request("GET", path).body == b"one"
    control.register(name, **file_of(server, "two"))
    assert server.request("GET", path).body == b"two"
    assert control.unregister(name)["status"] == "ok"
    assert server.request("GET", path).body == b"one"
    assert (server.config / name).exists()


def test_a_registration_is_told_which_fields_are_ignored(server, control, name):
    told = control.register(name, **file_of(server, "one"), readonly=True)
    warnings = ['unknown field "readonly"; did you mean "read_only"?']
    assert (told["status"], told["warnings"]) == ("ok", warnings)
    warned = [line for line in server.log.splitlines() if "did you mean" in line]
    assert ["[WARNING]" in line for line in warned] == [True]
    assert server.request("GET", f"/images/{name}").body == b"one"
    control.unregister(name)


def test_a_read_only_registration_is(server, control, name):
    control.register(name, **file_of(server, "one"), read_only=True)
    assert server.request("PUT", f"/images/{name}", b"x").status == 405
    assert (server.directory / "one").read_bytes() == b"one"
    control.unregister(name)


@pytest.mark.parametrize("odd", ["a\nb", ".hidden", "\u00fc", "x" * 255, "new-1", "a b"])
def test_any_id_may_be_registered(server, control, odd):
    control.register(odd, **file_of(server, "one"))
    quoted = "".join(f"%{byte:02x}" for byte in odd.encode())
    assert server.request("GET", f"/images/{quoted}").body == b"one"
    control.unregister(odd)


def test_status_of_one_tells_what_was_done_through_all_workers(server, control, big, name):
    control.register(name, **big)
    expected = {"requests_in_flight": 0, "bytes_read": 0, "bytes_written": 0, "last_error": None}
    assert control.status(name).items() >= expected.items()
    with one_connection_each(server) as connections:
        for connection in connections:
            part = {"Range": "bytes=100-1099"}
            assert exchange(connection, "GET", f"/images/{name}", headers=part).status == 206
            expected["bytes_read"] += 1000
            assert control.status(name).items() >= expected.items()
            body = b"\0" * 500
            part = {"Range": "bytes=0-499", "Content-Type": "application/octet-stream"}
            assert exchange(connection, "PATCH", f"/images/{name}", body, part).status == 200
            expected["bytes_written"] += 500
            assert control.status(name).items() >= expected.items()
    assert 0 <= control.status(name)["idle_seconds"] < 5
    control.unregister(name)
    assert control.status(name) == {"status": "error", "message": "unknown transfer_id"}


def test_status_of_one_tells_what_is_going_on(server, control, big, name):
    control.register(name, **big)
    url = f"/images/{name}"
    with reading(server, url), putting(server, url, BIG, bytes(8 << 20)) as (sock, _):
        wait_until(lambda: control.status(name)["requests_in_flight"] == 2)
        wait_until(lambda: control.status(name)["bytes_read"] > 0)
        sock.sendall(bytes(1 << 20))  # what is acknowledged is noted when more has come
        wait_until(lambda: control.status(name)["bytes_written"] > 0)
        assert control.status(name)["idle_seconds"] == 0
    wait_until(lambda: control.status(name)["requests_in_flight"] == 0)
    assert control.status(name)["last_error"].startswith(("ClientGone", "ShortBody"))
    control.unregister(name)


def test_status_of_one_tells_the_last_error(server, control, name):
    control.register(name, socket=str(server.directory / "none.sock"))
    assert server.request("GET", f"/images/{name}").status == 500
    assert "none.sock" in control.status(name)["last_error"]
    control.unregister(name)


def test_status_of_a_file_that_nobody_keeps_track_of_says_that_it_is_not_known(
    server, control, name
):
    server.add(name, **file_of(server, "one"))
    found = control.status(name)
    assert found.pop("active_transfers") >= 0
    names = ("bytes_read", "bytes_written", "idle_seconds", "last_error", "requests_in_flight")
    assert found == {"status": "ok"} | dict.fromkeys(names)
