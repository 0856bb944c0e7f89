# SPDX-License-Identifier: Apache-2.0
"""Transfers as files of a server's config directory (docs/api.md).

A new file gets its name by a rename: a server sees the old file or the new one, whole.
"""

import contextlib
import errno
import json
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from imageserver.backends.table import KINDS
from imageserver.client.failures import LocalFailure
from imageserver.core.transfer import (
    MAX_TRANSFER_SIZE,
    InvalidTransfer,
    Transfer,
    is_valid_id,
    open_to_others,
    parse_transfer,
    path_bytes,
    to_secret_fields,
)

_log = logging.getLogger(__name__)

_ROOT = 0  # uid
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

    def remove(self, transfer_id: str) -> None:
        """Delete a transfer's file, without waiting for its requests, which may end."""
        with self._local_errors("remove from"), contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(transfer_id))

    def list(self) -> list[Transfer]:
        """Return the transfers whose files count, in the order of ids; log why others do not.

        A server trusts files of the owners that it is told. They are not known here, so a file of
        another user than root and the directory's is returned, too, and what it takes is logged.

        Raises:
            LocalFailure: the directory cannot be read, or counts nowhere.
        """
        with self._local_errors("read"):
            directory = os.stat(self.path)
            listed = os.listdir(os.fsencode(self.path))
        if problem := open_to_others(directory.st_mode):
            raise LocalFailure(f"no server trusts {self.path}: it {problem}")
        names = sorted(filter(_is_id, (name.decode(errors="replace") for name in listed)))
        owners = frozenset((_ROOT, directory.st_uid))
        return [transfer for name in names if (transfer := self._listed(name, owners))]

    def _listed(self, name: str, owners: frozenset[int]) -> Transfer | None:
        path = os.path.join(self.path, name)
        try:
            uid, text = _contents(self._path(name))
            transfer = parse_transfer(name, text, KINDS)
        except FileNotFoundError:
            return None
        except OSError as exc:
            problem = "is a symbolic link" if exc.errno == errno.ELOOP else str(exc.strerror)
        except InvalidTransfer as exc:
            problem = str(exc)
        else:
            if uid not in owners:
                _log.warning(
                    "imagectl: %r counts only for a server of its owner, uid %d, "
                    "or whose IMAGESERVER_CONFIG_OWNERS has that user",
                    path,
                    uid,
                )
            return transfer
        _log.warning("imagectl: %r does not count: %s", path, problem)
        return None

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


def _contents(path: bytes) -> tuple[int, bytes]:
    """Read a transfer file like the server; return its owner as well.

    Raises:
        InvalidTransfer: it is none, or others could have written it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidTransfer("not a regular file")
        if problem := open_to_others(found.st_mode):
            raise InvalidTransfer(problem)
        with open(fd, "rb", closefd=False) as file:
            text = file.read(MAX_TRANSFER_SIZE + 1)
    finally:
        os.close(fd)
    if len(text) > MAX_TRANSFER_SIZE:
        raise InvalidTransfer(f"larger than {MAX_TRANSFER_SIZE} bytes")
    return found.st_uid, text
