# SPDX-License-Identifier: Apache-2.0
"""How a control program makes and ends transfers: files in a directory, or the control socket."""

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lab.servers import put_transfer

#: Longer than a request in flight takes to end: unregistering waits for those.
_PATIENCE_SECONDS = 90.0


class NotRegistered(Exception):
    """The server said no, or nothing."""


class Registrar(Protocol):
    """Makes and ends transfers; both count when the call returns. NotRegistered, OSError: not."""

    name: str

    def make(self, transfer_id: str, fields: Mapping[str, Any]) -> None:
        """Make a transfer, or replace it."""

    def end(self, transfer_id: str) -> None:
        """End a transfer, if there is one; on the socket, when its requests have ended."""


class Files:
    """The config directory."""

    name = "file"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def make(self, transfer_id: str, fields: Mapping[str, Any]) -> None:
        """Put the file in place."""
        put_transfer(self._directory, transfer_id, fields)

    def end(self, transfer_id: str) -> None:
        """Delete the file."""
        (self._directory / transfer_id).unlink(missing_ok=True)


class ControlSocket:
    """The control socket."""

    name = "socket"

    def __init__(self, path: Path) -> None:
        self._path = path

    def make(self, transfer_id: str, fields: Mapping[str, Any]) -> None:
        """Register it."""
        self._ask("register", transfer_id=transfer_id, config=dict(fields))

    def end(self, transfer_id: str) -> None:
        """Unregister it."""
        self._ask("unregister", transfer_id=transfer_id)

    def _ask(self, action: str, **more: object) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_PATIENCE_SECONDS)
            sock.connect(str(self._path))
            sock.sendall(json.dumps({"action": action, **more}).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
        try:
            answer = json.loads(line)
        except ValueError as exc:
            raise NotRegistered(f"{action}: {line!r}") from exc
        if answer.get("status") != "ok":
            raise NotRegistered(f"{action}: {answer}")
