# SPDX-License-Identifier: Apache-2.0
"""NBD servers that answer in any order, or are another one with each connection.

What a server can say wrongly in one byte is in ``scripts/prove evil``.
"""

import contextlib
import json
import random
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from proving.world import Answer, World

from tests.unit.nbd_liar import (
    CAN_FLUSH,
    CAN_ZERO,
    DISCONNECT,
    HAS_FLAGS,
    MULTI_CONN,
    READ,
    Liar,
    Peer,
    lying,
)

KIB = 1 << 10
CHUNK = 64 * KIB
READ_ONLY = 2


class Unbuffered:
    """A socket as a stream of which select(2) knows what has come."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.fileno, self.write = sock.fileno, sock.sendall

    def read(self, size: int) -> bytes:
        return self._sock.recv(size, socket.MSG_WAITALL) if size else b""

    def flush(self) -> None: ...


class Shuffling(Liar):
    """Answers what it has got in an order of its own; a read, with the number of its chunk."""

    def _serve(self, peer: Peer, number: int) -> None:
        self._negotiating(peer)
        choose, waiting = random.Random(1), []  # noqa: S311 - to be repeatable
        self.orders: list[list[int]] = []
        while True:
            if waiting and not select.select([peer.stream], [], [], 0.02)[0]:
                choose.shuffle(waiting)
                self.orders.append([offset for _, _, offset, _ in waiting])
                for told in waiting:
                    self.answer(peer, *told)
                waiting = []
                continue
            _, _, command, handle, offset, length = peer.take(">IHHQQI")
            if command == DISCONNECT:
                return
            waiting.append((command, handle, offset, length))

    def _negotiating(self, peer: Peer) -> None:
        peer.send(b"NBDMAGICIHAVEOPT", b"\0\3")
        peer.take(">I")
        self._negotiate(peer)

    def serve(self, client: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, struct.error), client:
            self._serve(Peer(Unbuffered(client)), number)  # type: ignore[arg-type]

    def answer(self, peer: Peer, command: int, handle: int, offset: int, length: int) -> None:
        if command != READ:
            super().answer(peer, command, handle, offset, length)
            return
        data = b"".join(
            bytes([at // CHUNK % 251]) * CHUNK for at in range(offset, offset + length, CHUNK)
        )
        head = (0x668E33EF, 1, 1, handle, 8 + len(data))
        peer.send(struct.pack(">IHHQI", *head), offset.to_bytes(8, "big"), data)


class Changing(Liar):
    """Says another size, and other flags, to each client."""

    told: Iterator[tuple[int, int]] = iter(())

    def _negotiate(self, peer: Peer) -> None:
        self.size, self.flags = next(self.told)
        super()._negotiate(peer)


@contextlib.contextmanager
def world_of(liar: Liar, **settings: object) -> Iterator[World]:
    with lying(liar), World(backend_timeout=1, **settings) as world:
        world.add("disk", socket=str(liar.path))
        yield world


def test_replies_in_any_order_are_the_image_in_its_order(tmp_path: Path) -> None:
    liar = Shuffling(tmp_path / "sock", size=12 * CHUNK)
    with world_of(liar, queue_depth=4) as world:
        answer = world.ask("GET", "/images/disk")
    assert answer.body == b"".join(bytes([n]) * CHUNK for n in range(12))
    assert any(order != sorted(order) for order in liar.orders)


def _told(seed: int) -> Iterator[tuple[int, int]]:
    choose = random.Random(seed)  # noqa: S311 - to be repeatable
    sizes = [0, 512, CHUNK, 3 * CHUNK + 512, 1 << 20, (1 << 63) - 512, 1 << 63]
    flags = [CAN_FLUSH, CAN_ZERO, MULTI_CONN, READ_ONLY]
    while True:
        size = choose.choice([1 << 20, choose.choice(sizes)])
        yield size, HAS_FLAGS | sum(flag for flag in flags if choose.random() < 0.5)


_ZERO = json.dumps({"op": "zero", "offset": 0, "size": CHUNK}).encode()
_JSON = {"Content-Type": "application/json"}
REQUESTS: list[tuple[str, str, bytes, dict[str, str]]] = [
    ("GET", "", b"", {"Range": "bytes=100-70000"}),
    ("PUT", "?flush=y", bytes(1 << 20), {}),
    ("PATCH", "", bytes(CHUNK), {"Range": f"bytes=0-{CHUNK - 1}"}),
    ("PATCH", "", _ZERO, _JSON),
    ("POST", "/flush", b"", {}),
    ("GET", "/extents?start=0&length=4096", b"", {}),
    ("GET", "/checksum?length=65536", b"", {}),
    ("OPTIONS", "", b"", {}),
]
#: Whatever the server is at the moment, an answer is one of these.
EXPECTED = {200, 206, 400, 405, 416, 500, 504}


def _is_whole(answer: Answer) -> bool:
    told = answer.headers.get("content-length")
    return answer.cut or told is None or int(told) == len(answer.body)


@pytest.mark.parametrize("writers", [1, 4])
def test_a_server_that_changes_between_two_connections_harms_no_request(
    tmp_path: Path, writers: int
) -> None:
    liar = Changing(tmp_path / "sock")
    with world_of(liar, max_writers=writers) as world:
        for seed in range(6):
            liar.told = _told(seed)
            for method, tail, body, headers in REQUESTS:
                answer = world.ask(method, f"/images/disk{tail}", body, headers)
                assert (answer.status in EXPECTED, answer.wrong) == (True, ""), answer
                assert _is_whole(answer)
            world.settle()
            assert list(world.left()) == []
        liar.told = iter([(1 << 20, HAS_FLAGS | CAN_FLUSH)] * 9)
        for method, tail, body, headers in REQUESTS:
            assert world.ask(method, f"/images/disk{tail}", body, headers).status < 300
