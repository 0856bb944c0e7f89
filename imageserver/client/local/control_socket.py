# SPDX-License-Identifier: Apache-2.0
"""Transfers registered through a server's control socket (docs/api.md), a connection each."""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from imageserver.backends.table import KINDS
from imageserver.client.failures import Busy, Failed, Refused, Unreachable
from imageserver.core.token import UNTOLD
from imageserver.core.transfer import (
    InvalidTransfer,
    Transfer,
    to_secret_fields,
    transfer_from_fields,
)

#: Longest answer that is read, in bytes: a page of a list.
_MAX_ANSWER = 4 << 20
#: Longest message of a server that is shown, in characters.
_MAX_SHOWN = 300
#: Messages of errors that a retry may change, and what is shown for them.
_TRANSIENT = {
    "busy": "busy; requests still use the transfer, which new ones cannot",
    "server busy": "server busy",
}


@dataclass(frozen=True, slots=True)
class ControlSocket:
    """A server's control socket; adding an id that is registered replaces it."""

    path: str
    timeout_seconds: float = 10.0

    def add(self, transfer: Transfer) -> None:
        """Register a transfer."""
        given = to_secret_fields(transfer)
        config = {name: value for name, value in given.items() if value is not None}
        self._ask(
            {"action": "register", "transfer_id": transfer.id, "config": config},
            self.timeout_seconds,
        )

    def remove(self, transfer_id: str, timeout: float | None, *, force: bool) -> None:
        """Unregister a transfer, and wait at most ``timeout`` seconds for its requests."""
        fields = {"action": "unregister", "transfer_id": transfer_id}
        # The server sends nothing while it waits.
        silence = None if timeout is None else timeout + self.timeout_seconds
        if self._ask(fields | {"timeout": timeout, "force": force}, silence).get("busy"):
            raise Busy(f"the server said: {_TRANSIENT['busy']}")

    def list(self) -> list[Transfer]:
        """Return the registered transfers, in the order of ids."""
        found: list[Transfer] = []
        while True:
            more = {"after": found[-1].id} if found else {}
            answer = self._ask({"action": "list"} | more, self.timeout_seconds)
            try:
                page = [_listed(each) for each in answer["transfers"]]
            except (KeyError, TypeError, InvalidTransfer) as exc:
                raise Failed(f"{self.path} answered with a list that is none") from exc
            found += page
            if not (page and answer.get("more")):
                return found

    def _ask(self, request: Mapping[str, object], silence: float | None) -> dict[str, Any]:
        text = json.dumps(request).encode() + b"\n"
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(self.timeout_seconds)
                sock.connect(self.path)
                sock.sendall(text)
                sock.settimeout(silence)
                with sock.makefile("rb") as file:
                    answer = file.readline(_MAX_ANSWER)
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise Unreachable(f"no answer from the control socket {self.path}: {reason}") from exc
        try:
            fields = json.loads(answer)
        except (ValueError, RecursionError) as exc:
            raise Failed(f"{self.path} answered with no JSON: is it a control socket?") from exc
        if not isinstance(fields, dict) or fields.get("status") not in {"ok", "error"}:
            raise Failed(f"{self.path} answered with no status: is it a control socket?")
        if fields["status"] == "ok":
            return fields
        message = str(fields.get("message"))[:_MAX_SHOWN]
        if message in _TRANSIENT:
            raise Busy(f"the server said: {_TRANSIENT[message]}")
        raise Refused(f"the server refused: {message}")


def _listed(each: Mapping[str, Any]) -> Transfer:
    """Return a transfer of a list, which tells no token, but that there is one."""
    fields = dict(each["config"])
    has_token = fields.pop("token", None) is not None
    transfer = transfer_from_fields(each["transfer_id"], fields, KINDS)
    return replace(transfer, token=UNTOLD) if has_token else transfer
