# SPDX-License-Identifier: Apache-2.0
"""Each operation on the image at /images/gated, and two ways to hold one half-way."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from tests.system.clients import read_answer
from tests.system.harness import Answer, Server, wait_until

SIZE = 256 << 10
JSON = "Content-Type: application/json"
#: Name of an operation: request line, fields, and body.
OPERATIONS: dict[str, tuple[str, tuple[str, ...], bytes]] = {
    "put part": ("PUT /images/gated", ("Content-Range: bytes 0-9/*",), bytes(10)),
    "patch part": ("PATCH /images/gated", ("Range: bytes=20-29",), bytes(10)),
    "zero": ("PATCH /images/gated", (JSON,), b'{"op":"zero","offset":40,"size":10}'),
    "flush": ("POST /images/gated/flush", (), b""),
    "patch flush": ("PATCH /images/gated", (JSON,), b'{"op":"flush"}'),
    "put": ("PUT /images/gated", (), bytes(SIZE)),
    "extents": ("GET /images/gated/extents", (), b""),
    "partial extents": ("GET /images/gated/extents?start=1&length=1", (), b""),
    "read": ("GET /images/gated", ("Range: bytes=0-9",), b""),
    "options": ("OPTIONS /images/gated", (), b""),
}
#: How each can be held: by a client that does not send the body, or at this gate.
BY_BODY = ("put part", "patch part", "put")
BY_GATE = {
    "read": "pread",
    "zero": "zero",
    "flush": "flush",
    "patch flush": "flush",
    "extents": "extents",
}


def head(name: str, *more: str) -> bytes:
    line, fields, body = OPERATIONS[name]
    lines = (f"{line} HTTP/1.1", "Host: x", *fields, *more, f"Content-Length: {len(body)}")
    return "\r\n".join((*lines, "", "")).encode()


@contextlib.contextmanager
def held_at_the_gate(server: Server, home: Path, name: str) -> Iterator[None]:
    """Let an operation wait for the back end; in the end it succeeds."""
    gate, taken = (home / f"{state}.{BY_GATE[name]}" for state in ("gate", "taken"))
    gate.touch()
    with server.raw(head(name) + OPERATIONS[name][2]) as sock, sock.makefile("rb") as stream:
        wait_until(taken.exists)
        try:
            yield
        finally:
            taken.unlink()
        assert read_answer(stream).status in {200, 206}


@contextlib.contextmanager
def held_by_the_client(server: Server, name: str) -> Iterator[socket.socket]:
    """Let an operation wait for its body; in the end it comes, if the connection still stands."""
    with server.raw(head(name, "Expect: 100-continue")) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).status == 100
        yield sock
        sock.sendall(OPERATIONS[name][2])
        assert read_answer(stream).status == 200


def ask(server: Server, name: str) -> tuple[int, str]:
    """Make a request; return the status, and the message of an error."""
    with server.raw(head(name) + OPERATIONS[name][2]) as sock:
        answer: Answer = read_answer(sock.makefile("rb"))
    return answer.refusal if answer.status >= 400 else (answer.status, "")
