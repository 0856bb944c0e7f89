# SPDX-License-Identifier: Apache-2.0
"""Unregistering what is in use (docs/api.md): who waits, who is told busy, who is cut."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.answers import UNKNOWN
from tests.system.clients import putting, reading
from tests.system.controlling import asked, controlled
from tests.system.disks import BIG
from tests.system.harness import Server, nbdkit, wait_until


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with controlled(workplace) as running:
        yield running


def test_unregister_waits_for_the_request_in_flight(server, control, big, name):
    control.register(name, **big)
    with putting(server, f"/images/{name}", BIG, bytes(1 << 20)) as (sock, stream):
        with asked(lambda: control.unregister(name)) as answers:
            wait_until(lambda: server.request("GET", f"/images/{name}").status == 404)
            time.sleep(0.3)
            assert answers == []
            sock.sendall(bytes(BIG - (1 << 20)))
            assert stream.readline().startswith(b"HTTP/1.1 200 ")
            wait_until(lambda: answers)
        assert answers[0]["status"] == "ok"


def test_unregister_that_waits_does_not_hear_of_new_requests(server, control, big, name):
    control.register(name, **big)
    url = f"/images/{name}"
    with reading(server, url) as sock, asked(lambda: control.unregister(name)) as answers:
        wait_until(lambda: server.request("GET", url).status == 404)
        for _ in range(50):
            assert server.request("OPTIONS", url).status == 404
        assert answers == []
        sock.close()


def test_unregister_says_busy_when_its_time_is_up_and_may_be_asked_again(
    server, control, big, name
):
    control.register(name, **big)
    with reading(server, f"/images/{name}") as sock:
        began = time.monotonic()
        busy = {"status": "error", "message": "busy"}
        assert control.unregister(name, timeout=0.5) == busy
        assert 0.5 <= time.monotonic() - began < 2
        assert server.request("GET", f"/images/{name}").refusal == UNKNOWN
        assert control.unregister(name, timeout=0) == busy
        sock.close()
        assert control.unregister(name, timeout=10)["status"] == "ok"


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_force_cuts_what_waits_for_its_client_within_a_second(server, control, big, name, method):
    control.register(name, **big)
    url = f"/images/{name}"
    before = server.holders()
    begun = reading(server, url) if method == "GET" else putting(server, url, BIG, bytes(1 << 20))
    with begun as running:
        sock = running if method == "GET" else running[0]
        began = time.monotonic()
        assert control.unregister(name, force=True)["status"] == "ok"
        assert time.monotonic() - began < 1
        assert server.holders() == before
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1 << 20):
                pass
    control.register(name, **big)
    assert server.request("PUT", url, bytes(BIG)).status == 200
    control.unregister(name)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_force_cuts_what_waits_for_its_back_end_within_a_second(
    server, control, workplace, name, method
):
    slow = ("--filter=delay", "memory", "1M", "delay-read=20", "delay-write=20", "delay-close=0")
    with nbdkit(workplace / f"slow-{method}.sock", *slow) as sock:
        control.register(name, socket=str(sock))
        body = bytes(1 << 20) if method == "PUT" else None

        def request() -> object:
            with contextlib.suppress(OSError, http.client.HTTPException):
                return server.request(method, f"/images/{name}", body).status
            return "cut"

        with asked(request) as answers:
            wait_until(lambda: control.status(name)["requests_in_flight"] == 1)
            time.sleep(0.3)
            began = time.monotonic()
            assert control.unregister(name, force=True)["status"] == "ok"
            assert time.monotonic() - began < 1.2
            wait_until(lambda: answers, 2)
        assert answers in ([500], ["cut"])


def test_force_cuts_what_waits_for_a_handshake_within_a_second(server, control, workplace, name):
    path = workplace / f"{name}.mute"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        control.register(name, socket=str(path))
        with server.raw(f"GET /images/{name} HTTP/1.1\r\nHost: x\r\n\r\n".encode()):
            wait_until(lambda: control.status(name)["requests_in_flight"] == 1)
            began = time.monotonic()
            assert control.unregister(name, force=True)["status"] == "ok"
            assert time.monotonic() - began < 1


def test_force_cuts_a_client_that_dawdles_over_a_small_body(server, control, big, name):
    control.register(name, **big)
    head = (
        f"PATCH /images/{name} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        "Content-Length: 100\r\n\r\n{"
    )
    with server.raw(head.encode()) as sock:
        wait_until(lambda: control.status(name)["requests_in_flight"] == 1)
        began = time.monotonic()
        assert control.unregister(name, force=True)["status"] == "ok"
        assert time.monotonic() - began < 1
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(1000):  # answered or not: it is over
                pass


def test_force_leaves_other_transfers_and_later_requests_alone(server, control, big, name):
    control.register(name, **big)
    control.register(f"{name}-other", **big)
    with reading(server, f"/images/{name}-other") as other:
        with reading(server, f"/images/{name}"):
            assert control.unregister(name, force=True)["status"] == "ok"
        control.register(name, **big)
        with reading(server, f"/images/{name}") as later:
            for sock in (other, later):
                left = BIG
                while left and (data := sock.recv(1 << 20)):
                    left -= len(data)
                assert left == 0
    control.unregister(name)
    control.unregister(f"{name}-other")


def test_a_peer_that_hangs_up_is_not_waited_for(server, control, big, name):
    control.register(name, **big)
    with reading(server, f"/images/{name}"):
        for _ in range(40):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(control.path))
                sock.sendall(
                    json.dumps({"action": "unregister", "transfer_id": name}).encode() + b"\n"
                )
        time.sleep(0.2)
        assert control.status()["status"] == "ok"
    assert control.unregister(name)["status"] == "ok"
