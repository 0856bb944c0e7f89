# SPDX-License-Identifier: Apache-2.0
"""A control program, and a server for it to speak to."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.system.harness import Server


def ask_raw(path: Path, request: bytes, *, ends: bool = False, timeout: float = 30) -> bytes:
    """Send bytes (``ends``: and say that there are no more); return all that comes back."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(str(path))
        sock.sendall(request)
        if ends:
            sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := sock.recv(65536):
            answer += data
        return answer


class Control:
    """The commands, each on a connection of its own; returns answers as they are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, **fields: object) -> Any:
        answer = ask_raw(self.path, json.dumps(fields).encode() + b"\n")
        assert answer.endswith(b"\n")
        assert answer.count(b"\n") == 1
        return json.loads(answer)

    def register(self, name: str, **config: object) -> Any:
        return self.ask(action="register", transfer_id=name, config=config)

    def unregister(self, name: str, **how: object) -> Any:
        return self.ask(action="unregister", transfer_id=name, **how)

    def status(self, name: str | None = None) -> Any:
        more = {} if name is None else {"transfer_id": name}
        return self.ask(action="status", **more)

    def list(self, **more: object) -> Any:
        return self.ask(action="list", **more)


@contextlib.contextmanager
def controlled(home: Path, **settings: object) -> Iterator[Server]:
    """Run a server with a control socket; beside it two files, each of which holds its name."""
    (home / "one").write_bytes(b"one")
    (home / "two").write_bytes(b"two")
    with Server(home, control_socket=home / "control", **settings) as running:
        yield running


def file_of(server: Server, name: str) -> dict[str, str]:
    """Return the transfer of one of these files."""
    return {"backend": "file", "file": str(server.directory / name), "format": "opaque"}


@contextlib.contextmanager
def asked(what: Callable[[], object]) -> Iterator[list[object]]:
    """Ask on a thread; the list gets the answer when it comes."""
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(what()))
    thread.start()
    yield answers
    thread.join(30)
    assert not thread.is_alive()
