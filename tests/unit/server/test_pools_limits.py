# SPDX-License-Identifier: Apache-2.0
"""What the threads do where there is no room, a defect, or an end: over a real loop and sockets."""

import contextlib
import logging
import socket
import threading
import time
from typing import Any

import pytest

from imageserver.images.probing import Asking
from imageserver.server import pools as module
from imageserver.web.body import ASKING
from tests.unit.logged import told
from tests.unit.server.test_pools import THREADS, _until, _World, world
from tests.unit.shortages import no_threads

__all__ = ["world"]


def _reasons(world: _World) -> list[str]:
    return world.pools._metrics.reasons  # type: ignore[attr-defined,no-any-return]


def _answer(client: socket.socket) -> tuple[bytes, dict[bytes, bytes], bytes]:
    head, _, body = client.recv(1000).partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    return first, dict(line.split(b": ", 1) for line in lines), body


def test_a_transfer_that_finds_no_thread_is_refused_logged_and_counted(
    world: _World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.paths["/endless"] = lambda _: str(world.go_on.wait(20)).encode()
    with contextlib.ExitStack() as stack:
        for _ in range(THREADS):
            stack.enter_context(world.send("GET", "/endless"))
        world.wait_for(THREADS, "/endless")
        first, fields, body = _answer(stack.enter_context(world.send("GET", "/one-more")))
        assert len(world.pools._handovers) == THREADS  # each ends by itself

    assert first == b"HTTP/1.1 503 Service Unavailable"
    assert (fields[b"Retry-After"], fields[b"Connection"]) == (b"1", b"close")
    assert body == b'{"error":"server busy"}'
    assert _reasons(world) == ["server_busy"]
    said = {"client": "unix", "status": 503, "detail": "server busy"}
    assert [told(record) for record in caplog.records] == [("head refused", said)]
    assert "/one-more" not in world.asked


def test_head_that_finds_no_thread_is_refused_without_a_body(world: _World) -> None:
    world.pools._probes.room = 0
    with world.send("HEAD", "/x") as client:
        first, fields, body = _answer(client)

    assert first == b"HTTP/1.1 503 Service Unavailable"
    assert (fields[b"Content-Length"], body) == (b"23", b"")


def test_a_body_is_read_from_its_client_who_has_the_client_timeout_for_it(world: _World) -> None:
    def read(environ: dict[str, Any]) -> bytes:
        body = environ["wsgi.input"]
        return bytes(body.read()) + b" %d" % body._wire.timeout

    world.paths["/body"] = read
    with world.send("PUT", "/body", extra="Content-Length: 3\r\n") as client:
        world.wait_for(1, "/body")
        client.sendall(b"abc")
        assert _answer(client)[2] == b"abc 60"


def test_an_abort_ends_as_soon_as_the_threads_have_given_back_what_they_had(world: _World) -> None:
    world.paths["/body"] = lambda environ: bytes(environ["wsgi.input"].read())
    with world.send("PUT", "/body", extra="Content-Length: 3\r\n") as client:
        world.wait_for(1, "/body")
        began = time.monotonic()
        world.pools.abort(10)
        assert time.monotonic() - began < 1
        assert world.pools.is_empty()
        assert client.recv(1) == b""


def test_a_head_that_is_none_is_refused_and_counted(world: _World) -> None:
    with world.send("G@T", "/x") as client:
        assert _answer(client)[0].startswith(b"HTTP/1.1 400 ")
    _until(lambda: _reasons(world) == ["bad_head"])


def test_an_answer_is_the_connections_last_once_the_worker_drains(world: _World) -> None:
    with world.send("GET", "/x") as client:
        assert b"close" not in _answer(client)[1].get(b"Connection", b"")
        world.pools.last = True
        client.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert _answer(client)[1][b"Connection"] == b"close"
        assert client.recv(1) == b""


def test_a_defect_cuts_its_connection_only_and_is_logged(
    world: _World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = module.serve

    def fail(conn: Any, *arguments: Any, **more: Any) -> bool:
        if b"/defect" in conn.buffer:
            raise ZeroDivisionError
        return served(conn, *arguments, **more)

    monkeypatch.setattr(module, "serve", fail)
    with world.send("GET", "/defect") as client, contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""
    _until(world.pools.is_empty)

    assert world.seconds("GET", "/x") < 1
    assert [record.getMessage() for record in caplog.records] == ["connection lost"]


def test_a_request_that_follows_one_answered_without_waiting_may_wait(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ASKING_SECONDS", 0.0)
    world.paths["/how"] = lambda environ: str(environ[ASKING].name).encode()
    world.go_on.set()
    with world.send("OPTIONS", "/hung") as client:
        assert _answer(client)[2] == Asking.NEVER.name.encode()
        client.sendall(b"OPTIONS /how HTTP/1.1\r\nHost: x\r\n\r\n")
        assert _answer(client)[2] in {Asking.NOW.name.encode(), Asking.ELSEWHERE.name.encode()}


def test_connections_of_a_reserved_listener_have_threads_of_their_own(world: _World) -> None:
    names: list[str] = []

    def answer(_environ: dict[str, Any], start_response: Any) -> list[bytes]:
        names.append(threading.current_thread().name.partition("_")[0])
        start_response("200 OK", [("Content-Length", "0")])
        return [b""]

    world.pools.reserve(str(world._path), answer)
    with world.send("GET", "/x") as client:
        assert _answer(client)[1][b"Connection"] == b"close"
    assert (names, world.asked) == (["admin"], [])


def test_a_transfer_that_no_thread_can_be_made_for_leaves_no_trace(world: _World) -> None:
    with no_threads(), world.send("GET", "/x") as client:
        assert _answer(client)[0].startswith(b"HTTP/1.1 503 ")
    _until(world.pools.is_empty)

    assert world.pools.busy() == 0
    assert world.seconds("GET", "/x") < 1


def test_a_transfer_waits_for_a_thread_that_only_waits_for_its_next_request(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_LONG_WAIT_MS", "_SHORT_WAIT_MS"):
        monkeypatch.setattr(module, name, 300)
    with contextlib.ExitStack() as stack:
        for _ in range(THREADS):
            client = stack.enter_context(world.send("GET", "/x"))
            assert _answer(client)[2] == b"ok"
        _until(lambda: len(world.pools._transfers.between_requests) == THREADS)

        assert world.seconds("GET", "/x") < 2
    assert _reasons(world) == []
