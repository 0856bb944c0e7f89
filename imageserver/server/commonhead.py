# SPDX-License-Identifier: Apache-2.0
"""Heads as clients of images send them, read line by line, most lines from memory.

gunicorn's parser takes a fifth of a small request's time. What this module reads, gunicorn would
read alike, which the tests compare; of anything else it says nothing, and gunicorn's parser reads
or refuses it (``request``). It takes

- HTTP/1.1, an own method, a path and query of plain characters, at most 4 KiB in all;
- fields of plain names, none twice, with printable ASCII in their values: a valid ``Host``, no
  ``Expect`` and no transfer coding, of ``Connection`` one option, a ``Content-Length`` in digits.

A client's requests differ in a line or two. The others have been read before, and are known.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import ClassVar, NamedTuple, TypeVar

from gunicorn.config import Config

#: RFC 9112 section 3.2, RFC 3986 section 3.2.2: an address in brackets, or a name, perhaps empty;
#: then perhaps a port. Zones of addresses (RFC 6874) come with and without their percent encoding.
HOST = re.compile(r"(\[[0-9A-Za-z:.%_~-]+\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(:[0-9]*)?")

#: Where gunicorn's limits are lower than these, it reads every head.
_MOST_BYTES, _MOST_FIELDS = 4096, 100
_END = b"\r\n\r\n"
_START = re.compile(
    r"(GET|PUT|PATCH|POST|OPTIONS|HEAD) "
    r"((/(?:[0-9A-Za-z._~%*-][0-9A-Za-z._~%*/-]*)?)(?:\?([0-9A-Za-z._~%*&=+-]*))?) HTTP/1\.1"
)
_FIELD = re.compile(r"([A-Za-z-]+):[\t ]*([\t -~]*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_OPTIONS = {"keep-alive": False, "Keep-Alive": False, "close": True}
#: By WSGI key: what the value of a field must be.
_IS_VALID: Mapping[str, Callable[[str], object]] = {
    "HTTP_HOST": HOST.fullmatch,
    "HTTP_CONNECTION": _OPTIONS.__contains__,
    "CONTENT_LENGTH": _LENGTH.fullmatch,
}
#: Fields that are the same in many requests. Nothing else is kept in memory: no token is.
_REPEATED = frozenset(
    (
        *("HTTP_HOST", "HTTP_CONNECTION", "HTTP_USER_AGENT", "CONTENT_TYPE", "CONTENT_LENGTH"),
        *("HTTP_ACCEPT", "HTTP_ACCEPT_ENCODING", "HTTP_ACCEPT_LANGUAGE", "HTTP_CACHE_CONTROL"),
    )
)
#: Most request lines, and most fields, that a process knows.
_MOST_KNOWN = 512
_Told = TypeVar("_Told")


class _Start(NamedTuple):
    """What a request line says."""

    method: str
    uri: str
    path: str
    query: str


class CommonHead:
    """A request's head: what ``request.ImageRequest`` has, and its fields by WSGI key."""

    __slots__ = ("ends", "fields", "length", "method", "path", "query", "scheme", "uri")

    ends: bool
    fields: dict[str, str]
    length: int
    method: str
    path: str
    query: str
    scheme: str
    uri: str
    version = (1, 1)
    expects_continue = False
    headers: ClassVar[tuple[tuple[str, str], ...]] = ()
    proxy_protocol_info = None

    def should_close(self) -> bool:
        """Tell whether the connection ends with this request."""
        return self.ends


class CommonHeads:
    """Reads such heads as gunicorn is configured to read them."""

    def __init__(self, cfg: Config) -> None:
        self._scheme = "https" if cfg.is_ssl else "http"
        self._is_used = (
            cfg.limit_request_line >= _MOST_BYTES
            and cfg.limit_request_field_size >= _MOST_BYTES
            and cfg.limit_request_fields >= _MOST_FIELDS
            and cfg.proxy_protocol == "off"
        )
        #: Fields that are not only taken over.
        self._others = frozenset(
            ("HTTP_EXPECT", "HTTP_TRANSFER_ENCODING", *map(key, cfg.secure_scheme_headers))
        )
        self._starts: dict[str, _Start] = {}
        self._fields: dict[str, tuple[str, str]] = {}

    def read(self, head: bytes) -> CommonHead | None:
        """Read a head that is complete; None: gunicorn's parser has to."""
        if not (self._is_used and len(head) <= _MOST_BYTES and head.endswith(_END)):
            return None
        first, *lines = head[: -len(_END)].decode("latin-1").split("\r\n")
        start = self._starts.get(first) or self._read_start(first)
        if start is None or len(lines) > _MOST_FIELDS:
            return None
        fields: dict[str, str] = {}
        known = self._fields
        for line in lines:
            pair = known.get(line) or self._read_field(line)
            if pair is None:
                return None
            name, value = pair
            fields[name] = value
        if len(fields) != len(lines) or "HTTP_HOST" not in fields:
            return None
        req = CommonHead()
        req.method, req.uri, req.path, req.query = start
        req.scheme, req.fields = self._scheme, fields
        req.length = int(fields.get("CONTENT_LENGTH", "0"))
        req.ends = _OPTIONS[fields.get("HTTP_CONNECTION", "keep-alive")]
        return req

    def _read_start(self, line: str) -> _Start | None:
        found = _START.fullmatch(line)
        if not found:
            return None
        start = _Start(found[1], found[2], found[3], found[4] or "")
        _remember(self._starts, line, start)
        return start

    def _read_field(self, line: str) -> tuple[str, str] | None:
        found = _FIELD.fullmatch(line)
        if not found:
            return None
        name, value = key(found[1]), found[2].rstrip(" \t")
        is_valid = _IS_VALID.get(name)
        if name in self._others or (is_valid and not is_valid(value)):
            return None
        if name in _REPEATED:
            _remember(self._fields, line, (name, value))
        return name, value


def _remember(known: dict[str, _Told], line: str, told: _Told) -> None:
    if len(known) >= _MOST_KNOWN:
        known.clear()
    known[line] = told


#: Fields that have no ``HTTP_`` before their names.
_BARE = {"CONTENT-TYPE", "CONTENT-LENGTH"}


@lru_cache(maxsize=256)
def key(name: str) -> str:
    """Return under which key of the WSGI environment a field is."""
    name = name.upper()
    return name.replace("-", "_") if name in _BARE else "HTTP_" + name.replace("-", "_")
