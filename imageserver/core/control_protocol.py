# SPDX-License-Identifier: Apache-2.0
"""The language of the control socket (docs/api.md): one JSON object in, one JSON line out.

    {"action":"status"}                                       Status()
    {"action":"status","transfer_id":ID}                      Status(ID)
    {"action":"register","transfer_id":ID,"config":{...}}     Register(transfer)
    {"action":"unregister","transfer_id":ID}                  Unregister(ID)
    {... "timeout":SECONDS, "force":true}                     ... that waits so long, or cuts
    {"action":"list","after":ID}                              List(ID)

No socket here, and no file.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from imageserver.core.jsontext import InvalidJson, parse_json
from imageserver.core.kinds import Kinds
from imageserver.core.transfer import (
    InvalidTransfer,
    Transfer,
    UnsupportedBackend,
    is_valid_id,
    to_fields,
    transfer_from_fields,
)

#: Longest request, in bytes: a configuration of the largest size (docs/api.md), escaped.
MAX_REQUEST = 128 * 1024
#: A list's answer ends with the transfer that makes it longer than so many bytes.
_PAGE_SIZE = 1 << 20
#: Longest wait that may be asked for: a year, in seconds.
_MAX_TIMEOUT = 31_536_000
_SHOWN = 64


class InvalidCommand(Exception):
    """The request is wrong; ``str()`` is what the peer is told."""


@dataclass(frozen=True, slots=True)
class Status:
    """How many transfers are there, or how is one used?"""

    transfer_id: str | None = None


@dataclass(frozen=True, slots=True)
class Register:
    """Make a transfer known, in place of an earlier one of the same id."""

    transfer: Transfer


@dataclass(frozen=True, slots=True)
class Unregister:
    """Make a transfer unknown, and wait for its requests; ``timeout`` None: the server's own.

    ``transfer_id`` is any text: who is to forget a transfer may well never have known it.
    """

    transfer_id: str
    timeout: float | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class List:
    """Which transfers are there, with ids beyond ``after``?"""

    after: str = ""


Command = Status | Register | Unregister | List


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of the socket (SO_PEERCRED, SO_PEERGROUPS)."""

    uid: int
    groups: frozenset[int]

    def may_control(self, uid: int, gid: int) -> bool:
        """Tell whether this is root, or the server's own user or group."""
        return self.uid in {0, uid} or gid in self.groups


def parse_command(text: bytes, kinds: Kinds) -> Command:
    """Parse a request, without the line's end.

    Raises:
        InvalidCommand: it is none.
    """
    try:
        fields = parse_json(text)
    except InvalidJson as exc:
        raise InvalidCommand(f"invalid JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise InvalidCommand("request must be a JSON object")
    action = fields.get("action")
    if action is None:
        raise InvalidCommand("missing action")
    if action == "register":
        return _register(fields, kinds)
    parse = _ACTIONS.get(action) if isinstance(action, str) else None
    if parse is None:
        raise InvalidCommand(f"unknown action: {shown(action)}")
    return parse(fields)


def shown(value: object) -> str:
    """Return the beginning of what a peer has sent, for a message."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _status(fields: Mapping[str, object]) -> Status:
    value = fields.get("transfer_id")
    return Status(None if value is None else _id(value))


def _register(fields: Mapping[str, object], kinds: Kinds) -> Register:
    value, config = fields.get("transfer_id"), fields.get("config")
    if value is None or config is None:
        raise InvalidCommand("missing transfer_id or config")
    transfer_id = _id(value)
    if not isinstance(config, dict):
        raise InvalidCommand("invalid config: not a JSON object")
    try:
        return Register(transfer_from_fields(transfer_id, config, kinds))
    except UnsupportedBackend as exc:
        raise InvalidCommand(f"unsupported backend: {exc.backend}") from exc
    except InvalidTransfer as exc:
        raise InvalidCommand(f"invalid config: {exc}") from exc


def _unregister(fields: Mapping[str, object]) -> Unregister:
    value = fields.get("transfer_id")
    if value is None:
        raise InvalidCommand("missing transfer_id")
    if not isinstance(value, str) or not value:
        raise InvalidCommand("invalid transfer_id")
    return Unregister(value, _timeout(fields.get("timeout")), _flag(fields.get("force")))


def _list(fields: Mapping[str, object]) -> List:
    value = fields.get("after")
    return List() if value is None else List(_id(value, "after"))


_ACTIONS: dict[str, Callable[[Mapping[str, object]], Command]] = {
    "status": _status,
    "unregister": _unregister,
    "list": _list,
}


def _id(value: object, name: str = "transfer_id") -> str:
    if not isinstance(value, str) or not is_valid_id(value):
        raise InvalidCommand(f"invalid {name}")
    return value


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise InvalidCommand("invalid timeout: not a number of seconds")
    return float(min(value, _MAX_TIMEOUT))


def _flag(value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise InvalidCommand("invalid force: not true or false")
    return bool(value)


def succeeded(active: int, **more: object) -> bytes:
    """Return the answer to a command that succeeded; ``active`` transfers are registered."""
    return _line({"status": "ok", "active_transfers": active} | more)


def page(transfers: Iterable[Transfer]) -> dict[str, object]:
    """Return as many of these as an answer holds, at least one, and whether there are more."""
    shown: list[dict[str, object]] = []
    room = _PAGE_SIZE
    for transfer in transfers:
        if room <= 0:
            return {"transfers": shown, "more": True}
        one: dict[str, object] = {"transfer_id": transfer.id, "config": to_fields(transfer)}
        room -= len(json.dumps(one))
        shown.append(one)
    return {"transfers": shown, "more": False}


def failed(message: str) -> bytes:
    """Return the answer to a command that failed."""
    return _line({"status": "error", "message": message})


def _line(answer: Mapping[str, object]) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode() + b"\n"
