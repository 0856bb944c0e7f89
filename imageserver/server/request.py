# SPDX-License-Identifier: Apache-2.0
"""A request's head as gunicorn parses it, with what RFC 9110 and 9112 require beyond that.

``Host`` must be present and well formed (gunicorn refuses two of them); ``Connection`` is a list;
a client of a later HTTP/1 is answered as one of HTTP/1.1.
"""

from gunicorn.config import Config
from gunicorn.http.body import ChunkedReader
from gunicorn.http.errors import InvalidRequestMethod, ParseException
from gunicorn.http.message import Request
from gunicorn.http.unreader import Unreader

from imageserver.server.commonhead import HOST, CommonHead, CommonHeads

_HTTP_1_1 = (1, 1)
#: What Falcon takes for no method of HTTP: it raises an error for it that no handler sees.
_NO_METHODS = {"WEBSOCKET"}
#: A chunked body is never read (docs/api.md): its end is unknown, so the connection ends.
_ENDLESS = 1 << 62


class HeadRules:
    """gunicorn's configuration as its parser reads it, in plain attributes.

    A ``Config`` looks each up in a table by a method, and the parser asks for twenty of them.
    """

    forwarded_allow_ips: list[str]

    def __init__(self, cfg: Config) -> None:
        vars(self).update((name, setting.get()) for name, setting in cfg.settings.items())
        self.is_ssl = cfg.is_ssl
        self.forwarded_allow_networks = cfg.forwarded_allow_networks
        self.proxy_allow_networks = cfg.proxy_allow_networks
        self.common = CommonHeads(cfg)


class BadHost(ParseException):  # type: ignore[misc]  # gunicorn has no types
    """``Host`` is missing or malformed; ``str()`` is what the client is told."""


class _HeadReader(Unreader):  # type: ignore[misc]  # gunicorn has no types
    """A head that is in memory; nothing follows it."""

    def __init__(self, head: bytes) -> None:
        self._head = head

    def read(self, _size: int | None = None, _read_ahead: int | None = None) -> bytes:
        head, self._head = self._head, b""
        return head

    def unread(self, data: bytes) -> None:
        self._head = data


def parse_head(
    rules: HeadRules, head: bytes, address: object, number: int
) -> "CommonHead | ImageRequest":
    """Parse a head; ``number``: it is the connection's so many-th.

    Raises:
        BadHost, and gunicorn's ``ParseException``s.
    """
    return rules.common.read(head) or ImageRequest(rules, _HeadReader(head), address, number)


class ImageRequest(Request):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's request, with these rules.

    Raises:
        BadHost, and gunicorn's ``ParseException``s.
    """

    version: tuple[int, int]
    cfg: HeadRules
    #: By WSGI key: not known.
    fields = None

    def __init__(self, rules: HeadRules, unreader: Unreader, address: object, number: int) -> None:
        super().__init__(rules, unreader, address, number)
        if self.method in _NO_METHODS:
            raise InvalidRequestMethod(self.method)
        # RFC 9110 section 2.5: a client of a later minor version understands this one.
        self.version = min(self.version, _HTTP_1_1)
        host: str | None = None
        options: list[str] = []
        for name, value in self.headers:
            if name == "HOST":
                host = value
            elif name == "CONNECTION":
                # RFC 9110 section 7.6.1: a list, over all lines of the field, in any case.
                options += [option.strip(" \t") for option in value.lower().split(",")]
        _check_host(host, required=self.version == _HTTP_1_1)
        self._ends = self.method == "CONNECT" or _ends(options, is_old=self.version < _HTTP_1_1)

    def _peer_is_trusted_proxy(self) -> bool:
        # gunicorn always trusts a peer at a Unix socket; here that is a client like any other.
        return bool(self.cfg.forwarded_allow_ips) and bool(super()._peer_is_trusted_proxy())

    @property
    def length(self) -> int:
        """The length of its body, in bytes. A chunked one is never read to its end."""
        reader = self.body.reader
        return _ENDLESS if isinstance(reader, ChunkedReader) else int(reader.length)

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for ``100 Continue`` before it sends its body."""
        return bool(self._expected_100_continue)

    def should_close(self) -> bool:
        """Tell whether the connection ends with this request."""
        return bool(self.must_close) or self._ends


def _ends(options: list[str], *, is_old: bool) -> bool:
    """Tell whether a client wants its connection to end (RFC 9112 section 9.3)."""
    return "close" in options or (is_old and "keep-alive" not in options)


def _check_host(host: str | None, *, required: bool) -> None:
    if host is None and required:
        raise BadHost("Host header required")
    if host is not None and not HOST.fullmatch(host):
        raise BadHost("invalid Host header")
