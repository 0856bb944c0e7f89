# SPDX-License-Identifier: Apache-2.0
"""Transfers made known to a server: through its control socket, or as files of its directory.

Two ways with one interface, ``Socket`` and ``Directory``; docs/api.md has what both promise.
Adding what is there replaces it. A file appears by a rename, so that a server sees the old or
the new one.
"""

import contextlib
import json
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from imageserver.backends.table import KINDS
from imageserver.client.failures import Busy, Failed, LocalFailure, Refused, Unreachable
from imageserver.core.transfer import (
    MAX_TRANSFER_SIZE,
    InvalidTransfer,
    Transfer,
    is_valid_id,
    parse_transfer,
    path_bytes,
    to_fields,
    transfer_from_fields,
)

#: Longest answer of a server that is read, in bytes: a page of a list, and its last transfer.
_MAX_ANSWER = 4 << 20
#: Longest message of it that is shown, in characters.
_MAX_SHOWN = 300
#: What may be otherwise when asked again, and what it means.
_TRANSIENT = {
    "busy": "busy; requests still use the transfer, which new ones cannot",
    "server busy": "server busy",
}
#: Prefix of files that have not got their name yet: an id that nobody guesses.
_NEW = ".imagectl-"


@dataclass(frozen=True, slots=True)
class Socket:
    """A server's control socket."""

    path: str
    timeout_seconds: float = 10.0

    def add(self, transfer: Transfer) -> None:
        """Register a transfer."""
        config = {name: value for name, value in to_fields(transfer).items() if value is not None}
        self._ask(
            {"action": "register", "transfer_id": transfer.id, "config": config},
            self.timeout_seconds,
        )

    def remove(self, transfer_id: str, timeout: float | None, *, force: bool) -> None:
        """Unregister a transfer, and wait for its requests, ``timeout`` seconds at most."""
        fields = {"action": "unregister", "transfer_id": transfer_id}
        # A server that waits says nothing meanwhile.
        silence = None if timeout is None else timeout + self.timeout_seconds
        self._ask(fields | {"timeout": timeout, "force": force}, silence)

    def list(self) -> list[Transfer]:
        """Return what is registered, in the order of ids."""
        found: list[Transfer] = []
        while True:
            more = {"after": found[-1].id} if found else {}
            answer = self._ask({"action": "list"} | more, self.timeout_seconds)
            try:
                page = [
                    transfer_from_fields(each["transfer_id"], each["config"], KINDS)
                    for each in answer["transfers"]
                ]
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


@dataclass(frozen=True, slots=True)
class Directory:
    """A server's config directory."""

    path: str

    def add(self, transfer: Transfer) -> None:
        """Write a transfer's file.

        Its mode is 0600, or 0640 where the directory hands its group on (set-group-ID): that
        group is the server's, which could not read it otherwise.
        """
        fields = {name: value for name, value in to_fields(transfer).items() if value is not None}
        text = json.dumps(fields, ensure_ascii=False).encode() + b"\n"
        if len(text) > MAX_TRANSFER_SIZE:
            raise LocalFailure(f"the transfer takes more than {MAX_TRANSFER_SIZE} bytes")
        with self._local_errors("write"):
            inherits = os.stat(self.path).st_mode & stat.S_ISGID
            new = self._path(_NEW + secrets.token_hex(16))
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with open(fd, "wb") as file:
                    file.write(text)
                    os.fchmod(fd, 0o640 if inherits else 0o600)
                os.rename(new, self._path(transfer.id))
            except BaseException:
                os.unlink(new)
                raise

    def remove(self, transfer_id: str, timeout: float | None, *, force: bool) -> None:
        """Delete a transfer's file; requests under way are finished, nothing waits for them."""
        if timeout is not None or force:
            raise Refused("only a control socket can wait for requests or cut them")
        with self._local_errors("remove from"), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(transfer_id))

    def list(self) -> list[Transfer]:
        """Return the transfers whose files can be read and count, in the order of ids."""
        with self._local_errors("read"):
            listed = os.listdir(os.fsencode(self.path))
        names = sorted(filter(_is_id, (name.decode(errors="replace") for name in listed)))
        found = []
        for name in names:
            with contextlib.suppress(OSError, InvalidTransfer):
                found.append(parse_transfer(name, _contents(self._path(name)), KINDS))
        return found

    def _path(self, name: str) -> bytes:
        return os.path.join(os.fsencode(self.path), path_bytes(name))

    @contextlib.contextmanager
    def _local_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise LocalFailure(f"cannot {what} {self.path}: {exc.strerror}") from exc


def _is_id(name: str) -> bool:
    return is_valid_id(name) and not name.startswith(_NEW)


def _contents(path: bytes) -> bytes:
    """Read what is a transfer file, as the server does: a regular one, not through a link."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidTransfer("not a regular file")
        text = file.read(MAX_TRANSFER_SIZE + 1)
    if len(text) > MAX_TRANSFER_SIZE:
        raise InvalidTransfer("too large")
    return text
