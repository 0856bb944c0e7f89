# SPDX-License-Identifier: Apache-2.0
"""Clients that leave while a slow back end works for them: soon nothing is held for them."""

import http.client
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.harness import Server, nbdkit, wait_until

SETTINGS = {"workers": 2, "chunk_size": 4096}
SIZE = 1 << 30
JSON = "Content-Type: application/json"
#: What takes minutes at this server, or seconds before the first byte.
SLOW = {
    "zero": ("PATCH", (JSON,), b'{"op":"zero","size":%d}' % SIZE),
    "read": ("GET", (), b""),
    "read, with a body that nobody reads": ("GET", (), b"{}"),
}


@pytest.fixture(scope="module")
def slow(server: Server, workplace: Path) -> Iterator[str]:
    """An export that writes 60 KiB a second, for want of write-zeroes, and reads after 4 s."""
    filters = ("--filter=nozero", "--filter=delay", "memory", str(SIZE), "zeromode=none")
    with nbdkit(workplace / "slow.sock", *filters, "wdelay=200ms", "rdelay=4") as sock:
        yield server.add("slow", socket=str(sock))


def _ask(server: Server, path: str, name: str) -> socket.socket:
    method, fields, body = SLOW[name]
    head = (f"{method} {path} HTTP/1.1", "Host: x", *fields, f"Content-Length: {len(body)}")
    return server.raw("\r\n".join((*head, "", "")).encode() + body)


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("leave", [_reset, socket.socket.close], ids=["reset", "close"])
@pytest.mark.parametrize("name", SLOW)
def test_a_client_that_leaves_gives_lock_and_slot_back(
    server: Server, slow: str, name: str, leave: Callable[[socket.socket], None]
):
    gone = server.log.count("ClientGone")
    with _ask(server, slow, name) as client:
        wait_until(server.holders)
        leave(client)
        wait_until(lambda: server.holders() == [], 3)
    wait_until(lambda: server.log.count("ClientGone") == gone + 1)


def test_a_client_that_has_only_stopped_sending_gets_its_answer(server: Server, slow: str):
    body = b'{"op":"zero","size":4096}'
    head = f"PATCH {slow} HTTP/1.1\r\nHost: x\r\n{JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
    with server.raw(head.encode() + body) as client:
        client.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.read()) == (200, b'{"ok":true}')
