# SPDX-License-Identifier: Apache-2.0
"""Transfers: the right to one image, as a control program wrote it down.

A transfer is a JSON object in a file named by the transfer's id. Here live the two parsers,
of the id and of the object; what an object says of its image is for the image's kind (``kinds``).
No file is opened here.
"""

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath

from imageserver.core.jsontext import InvalidJson, parse_json
from imageserver.core.kinds import Image, ImageKind, Kinds
from imageserver.core.token import VALID, Token, is_token

#: Largest transfer file, in bytes.
MAX_TRANSFER_SIZE = 64 * 1024
#: Longest file name of Linux (NAME_MAX), in bytes; a longer id cannot have a file.
MAX_ID_SIZE = 255
_NO_ID = re.compile("[/\\\\\0\ufffd]")
#: What an idle timeout below one second means (docs/api.md).
DAY_SECONDS = 86400
#: Longest idle timeout, and what a longer one means: 68 years.
MAX_IDLE_SECONDS = 2**31 - 1
#: So many of the fields that nobody knows are named, each with so many characters.
_MAX_NAMED = 8
_MAX_QUOTED = 64


class InvalidTransfer(Exception):
    """A transfer's object is unusable; ``str()`` names the field and what would be right."""


class UnsupportedBackend(InvalidTransfer):
    """There is no back end of this name."""

    def __init__(self, backend: str, kinds: Kinds) -> None:
        self.backend = _quoted(backend)
        known = " or ".join(f'"{name}"' for name in kinds)
        super().__init__(f'unsupported backend: {self.backend}; "backend" must be {known}')


@dataclass(frozen=True, slots=True)
class Transfer:
    """The right to read, or to read and write, one image."""

    id: str
    image: Image
    read_only: bool = False
    idle_seconds: int | None = None
    """Expires when unused for so long; None: never."""
    token: Token | None = None
    """What every request must show; None: nothing but the id."""
    changed_ns: int = field(default=0, compare=False)
    """When the file that says so was changed, since the Unix epoch."""
    ignored: tuple[str, ...] = field(default=(), compare=False)
    """A sentence on each field that was ignored, for a misspelt one changes what is served."""

    def is_still(self, other: "Transfer") -> bool:
        """Tell whether the transfer has neither ended nor changed since it was ``other``."""
        return self is other or (self == other and self.changed_ns == other.changed_ns)


def is_valid_id(text: str) -> bool:
    """Tell whether ``text`` can name a transfer: one path component of valid UTF-8.

    ``*`` is the server itself (docs/api.md); U+FFFD is what undecodable bytes turn into.
    """
    return len(text) <= MAX_ID_SIZE and _is_valid(text)


@lru_cache(1024)  # short texts only: what a client makes up stays in memory
def _is_valid(text: str) -> bool:
    if text in {"", ".", "..", "*"} or _NO_ID.search(text):
        return False
    try:
        return len(text.encode()) <= MAX_ID_SIZE
    except UnicodeEncodeError:
        return False


def parse_transfer(transfer_id: str, text: bytes, kinds: Kinds) -> Transfer:
    """Parse a transfer file.

    Raises:
        InvalidTransfer: not JSON, not an object, or a field is missing, blank or ill-typed.
    """
    try:
        fields = parse_json(text)
    except InvalidJson as exc:
        raise InvalidTransfer(f"not valid JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise InvalidTransfer("not a JSON object")
    return transfer_from_fields(transfer_id, fields, kinds)


def transfer_from_fields(transfer_id: str, fields: Mapping[str, object], kinds: Kinds) -> Transfer:
    """Build a transfer from a parsed object.

    Raises:
        InvalidTransfer: a field is missing, blank or ill-typed.
    """
    backend = parse_text(fields, "backend", default=next(iter(kinds)))
    kind = kinds.get(backend.lower())
    if kind is None:
        raise UnsupportedBackend(backend, kinds)
    read_only = parse_flag(fields, "read_only", default=False)
    idle, token = _idle_seconds(fields), _token(fields)
    image = kind.parse(fields)
    ignored = _ignored(fields, image.kind, kinds)
    return Transfer(transfer_id, image, read_only, idle, token, ignored=ignored)


def to_fields(transfer: Transfer) -> dict[str, object]:
    """Return a transfer's object, as it may be shown: of a token it says only that there is one.

    Without a token it is what ``transfer_from_fields`` turns into this transfer.
    """
    image = transfer.image
    common = {"read_only": transfer.read_only, "idle_timeout_seconds": transfer.idle_seconds}
    token = {"token": True} if transfer.token else {}
    return {"backend": image.kind.backend} | image.fields() | common | token


def to_secret_fields(transfer: Transfer) -> dict[str, object]:
    """Return the object that ``transfer_from_fields`` turns into this transfer, token and all.

    For whom it is kept, or made known to, only: never for a log or a status.
    """
    token = {"token": transfer.token.secret} if transfer.token else {}
    return to_fields(transfer) | token


def overdue_ns(transfer: Transfer, unused_ns: int) -> int | None:
    """Return how long ago a transfer's idle time was over; None: it is not, or has no end."""
    idle = transfer.idle_seconds
    over_ns = -1 if idle is None else unused_ns - idle * 1_000_000_000
    return over_ns if over_ns >= 0 else None


def open_to_others(mode: int) -> str | None:
    """Return why a transfer's file, or its directory, of this mode does not count, if so."""
    if mode & 0o022:
        return f"can be written by group or others (mode {mode & 0o7777:04o})"
    return None


def path_bytes(path: str) -> bytes:
    """Return a path, or an id as a file's name, for the kernel: UTF-8 whatever the locale."""
    return path.encode()


def path_text(path: bytes) -> str:
    """Return a path for a message, whatever its bytes."""
    return path.decode(errors="backslashreplace")


def id_hash(transfer_id: str) -> str:
    """Return 64 hexadecimal digits that stand for an id in names of the server's own files."""
    return hashlib.sha256(transfer_id.encode()).hexdigest()


def _idle_seconds(fields: Mapping[str, object]) -> int | None:
    value = fields.get("idle_timeout_seconds")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTransfer('"idle_timeout_seconds" must be an integer')
    return min(value, MAX_IDLE_SECONDS) if value >= 1 else DAY_SECONDS


def _token(fields: Mapping[str, object]) -> Token | None:
    value = fields.get("token")
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidTransfer('"token" must be a string')
    if not is_token(value):  # the message goes to logs: nothing of the value is in it
        raise InvalidTransfer(f'"token" must be {VALID}')
    return Token(value)


def _quoted(text: str) -> str:
    """Return text for a log line: printable, on one line, not endless."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_QUOTED])


#: The fields of every transfer; the server's own files have their id as well.
_COMMON_FIELDS = ("backend", "read_only", "idle_timeout_seconds", "token", "transfer_id")


def _ignored(fields: Mapping[str, object], kind: ImageKind, kinds: Kinds) -> tuple[str, ...]:
    """Return a sentence on each field that this kind does not have; ``null`` is none."""
    known = (*_COMMON_FIELDS, *kind.own_fields)
    unknown = [name for name in fields if name not in known and fields[name] is not None]
    told = [_told(name, known, kinds) for name in unknown[:_MAX_NAMED]]
    if len(unknown) > _MAX_NAMED:
        told.append(f"and {len(unknown) - _MAX_NAMED} more")
    return tuple(told)


def _told(name: str, known: tuple[str, ...], kinds: Kinds) -> str:
    for kind in kinds.values():
        if name in kind.own_fields:
            return f'field "{name}" is of backend "{kind.backend}"'
    near = difflib.get_close_matches(name[:_MAX_QUOTED].lower(), known, 1)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    return f'unknown field "{_quoted(name)}"{hint}'


def parse_text(fields: Mapping[str, object], name: str, default: str | None = None) -> str:
    """Return a field that is a string; without ``default`` it must be there.

    Raises:
        InvalidTransfer: it is missing, or not a string that UTF-8 and C can hold.
    """
    value = fields.get(name)
    if value is None:
        if default is None:
            raise InvalidTransfer(f'missing "{name}"')
        return default
    if not isinstance(value, str):
        raise InvalidTransfer(f'"{name}" must be a string')
    if "\0" in value:
        raise InvalidTransfer(f'"{name}" must not contain NUL')
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        raise InvalidTransfer(f'"{name}" must be valid Unicode') from exc
    return value


def parse_flag(fields: Mapping[str, object], name: str, *, default: bool) -> bool:
    """Return a field that is true or false.

    Raises:
        InvalidTransfer: it is neither.
    """
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidTransfer(f'"{name}" must be true or false')
    return value


def parse_path(fields: Mapping[str, object], name: str) -> str:
    """Return a field that is an absolute path, without blanks around it.

    Raises:
        InvalidTransfer: it is missing, or no such path.
    """
    value = parse_text(fields, name).strip()
    if not value:
        raise InvalidTransfer(f'"{name}" must not be blank')
    if not PurePosixPath(value).is_absolute():
        raise InvalidTransfer(f'"{name}" must be an absolute path')
    return value
