# SPDX-License-Identifier: Apache-2.0
"""How a control program makes and ends transfers: files in a directory, or the control socket."""

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

#: Longer than a request in flight takes to end: unregistering waits for those.
_PATIENCE_SECONDS = 90.0


class DoorFailed(Exception):
    """The server said no, or nothing."""


class Door(Protocol):
    """Makes and ends transfers; both count when the call returns."""

    name: str

    def make(self, transfer_id: str, fields: Mapping[str, Any]) -> None:
        """Make a transfer, or replace it."""

    def end(self, transfer_id: str) -> None:
        """End a transfer, if there is one."""


class Files:
    """The config directory."""

    name = "file"

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def make(self, transfer_id: str, fields: Mapping[str, Any]) -> None:
        """Put the file in place, whole."""
        temporary = self._directory / f".{transfer_id}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(fields, file)
            temporary.rename(self._directory / transfer_id)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def end(self, transfer_id: str) -> None:
        """Delete the file."""
        (self._directory / transfer_id).unlink(missing_ok=True)


class ControlSocket:
    """The control socket."""

    name = "socket"

    def __init__(self, path: Path) -> None:
        self._path = path

    def make(self, transfer_id: str, fields: Mapping[str, Any]) -> None:
        """Register it.

        Raises:
            DoorFailed, OSError: it was not done.
        """
        self._ask({"action": "register", "transfer_id": transfer_id, "config": dict(fields)})

    def end(self, transfer_id: str) -> None:
        """Unregister it; returns when its requests have ended.

        Raises:
            DoorFailed, OSError: it was not done.
        """
        self._ask({"action": "unregister", "transfer_id": transfer_id})

    def _ask(self, command: dict[str, Any]) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_PATIENCE_SECONDS)
            sock.connect(str(self._path))
            sock.sendall(json.dumps(command).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
        try:
            answer = json.loads(line)
        except ValueError as exc:
            raise DoorFailed(f"{command['action']}: {line!r}") from exc
        if answer.get("status") != "ok":
            raise DoorFailed(f"{command['action']}: {answer}")
