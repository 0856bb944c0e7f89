# SPDX-License-Identifier: Apache-2.0
"""Transfers as files of a server's config directory (docs/api.md).

A new file gets its name by a rename: a server sees the old file or the new one, whole.
"""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from imageserver.backends.table import KINDS
from imageserver.client.failures import LocalFailure, Refused
from imageserver.core.transfer import (
    MAX_TRANSFER_SIZE,
    InvalidTransfer,
    Transfer,
    is_valid_id,
    parse_transfer,
    path_bytes,
    to_secret_fields,
)

#: Prefix of new files before their rename; the rest is random: a server may see it as an id.
_NEW = ".imagectl-"


@dataclass(frozen=True, slots=True)
class ConfigDirectory:
    """A server's config directory; adding an id that has a file replaces it."""

    path: str

    def add(self, transfer: Transfer) -> None:
        """Write a transfer's file.

        Its mode is 0600; or 0640 where the directory has the set-group-ID bit, so that the
        server can read it, whose group the directory has.
        """
        given = to_secret_fields(transfer)
        fields = {name: value for name, value in given.items() if value is not None}
        text = json.dumps(fields, ensure_ascii=False).encode() + b"\n"
        if len(text) > MAX_TRANSFER_SIZE:
            raise LocalFailure(f"the transfer takes more than {MAX_TRANSFER_SIZE} bytes")
        with self._local_errors("write"):
            inherits = os.stat(self.path).st_mode & stat.S_ISGID
            new = self._path(_NEW + os.urandom(16).hex())
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
        """Delete a transfer's file, without waiting for its requests, which may end."""
        if timeout is not None or force:
            raise Refused("only a control socket can wait for requests or cut them")
        with self._local_errors("remove from"), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(transfer_id))

    def list(self) -> list[Transfer]:
        """Return the transfers whose files are valid, in the order of ids."""
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
    """Read a transfer file like the server: a regular file, no symbolic link."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidTransfer("not a regular file")
        text = file.read(MAX_TRANSFER_SIZE + 1)
    if len(text) > MAX_TRANSFER_SIZE:
        raise InvalidTransfer("too large")
    return text
