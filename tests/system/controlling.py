# SPDX-License-Identifier: Apache-2.0
"""A control program: it speaks to the control socket of a server."""

import json
import socket
from pathlib import Path
from typing import Any


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
