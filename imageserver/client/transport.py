# SPDX-License-Identifier: Apache-2.0
"""HTTP to one server through urllib3's connection pool: over TCP, TLS, or a Unix socket.

One request is tried once: who retries is ``backoff``. urllib3's errors become ours here and
in ``translated``, and its answers leave only with a status that was asked for.
"""

import contextlib
import json
import re
import socket
import ssl
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from imageserver.client.errors import (
    Broken,
    Busy,
    ClientError,
    Failed,
    LocalFailure,
    Refused,
    Unreachable,
)

#: Asked again later, these may be answered otherwise (502 and 504: a proxy before a restart).
_TRANSIENT = {408, 409, 425, 429, 502, 503, 504}
#: Longest message of a server that is shown, in bytes.
_MAX_MESSAGE = 4096
#: Longest rest of a body that is read only to use the connection again.
_MAX_REST = 64 * 1024
_BELOW_ERRORS = 300
#: What a host's name or address has none of: blanks, controls, and what ends it in a URL.
_HOST = re.compile(r"[^\s\x00-\x20\x7f\\<>\"^`{|}]+")
_SECONDS = re.compile(r"[0-9]{1,6}")

Response = urllib3.BaseHTTPResponse


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach a URL; ``unix_socket`` may begin with ``@`` or NUL (abstract)."""

    url: str
    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    unix_socket: str | None = None
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Refuse what cannot be asked; forget a password, which is sent and shown nowhere.

        Raises:
            BadUrl: the URL is none.
        """
        object.__setattr__(self, "url", _checked(self.url))


class BadUrl(ClientError):
    """A URL is none: a wrong argument, like click's."""

    status = 2


def _checked(url: str) -> str:
    """Return a URL without user and password, if it is one that can be asked."""
    masked = re.sub("//[^/]*@", "//", url)
    wrong = BadUrl(f"{masked!r} is no URL: its host or port is wrong")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as exc:  # of which UnicodeError is one
        raise wrong from exc
    if parts.scheme not in {"http", "https"} or not host:
        raise BadUrl(f"{masked!r} is no http:// or https:// URL")
    if port == 0 or not _HOST.fullmatch(host):
        raise wrong
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class _Sockets:
    """The sockets of a pool's connections: a thread that waits for one is woken by its end."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()

    def cut(self) -> None:
        """End all connections, whoever is using them."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS, not unwrap()

    def made(self, sock: socket.socket | None) -> None:
        """Note a new one."""
        if sock is not None:
            self._sockets.add(sock)


class _Connection(HTTPConnection):
    """A plain connection that says which socket it has."""

    sockets: _Sockets
    #: The Unix socket to connect to, if any.
    path: str | None = None

    def connect(self) -> None:
        """Connect over TCP, or to the Unix socket."""
        if self.path is None:
            super().connect()
        else:
            self.sock = self._connected(self.path)
        self.sockets.made(self.sock)

    def _connected(self, path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout if isinstance(self.timeout, int | float) else None)
            sock.connect(path)
        except OSError as exc:
            sock.close()
            raise exceptions.NewConnectionError(self, exc.strerror or str(exc)) from exc
        return sock


class _TlsConnection(HTTPSConnection):
    """The same with TLS."""

    sockets: _Sockets

    def connect(self) -> None:
        """Connect and shake hands."""
        super().connect()
        self.sockets.made(self.sock)


class Transport:
    """Requests to one server; its methods may be called by several threads at once."""

    def __init__(self, access: Access, connections: int = 8) -> None:
        parts = urlsplit(access.url)
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        #: How the server is called in messages.
        self.name = access.unix_socket or parts.netloc
        self._sockets = _Sockets()
        self._pool = _pool(access, connections, self._sockets)

    def request(
        self,
        method: str,
        target: str,
        *,
        expected: Iterable[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[object] | None = None,
    ) -> Response:
        """Make a request; return the answer, its body unread.

        Raises:
            Transient: it may succeed if made again.
            Refused, Failed: it will not.
        """
        with self.translated():
            response = self._pool.urlopen(
                method,
                target,
                body=body,  # type: ignore[arg-type] # pieces for `send`, which takes any buffer
                headers={"User-Agent": "imagectl", "Accept-Encoding": "identity"}
                | dict(headers or {}),
                retries=False,
                redirect=False,
                assert_same_host=False,
                preload_content=False,
            )
            if response.status in expected:
                return response
            raise self._refusal(method, response)

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn urllib3's errors into ours."""
        try:
            yield
        except (exceptions.NewConnectionError, exceptions.ConnectTimeoutError) as exc:
            raise Unreachable(f"cannot connect to {self.name}: {_reason(exc)}") from exc
        except (exceptions.SSLError, ssl.SSLError) as exc:
            if "CERTIFICATE" in str(exc).upper() or "WRONG_VERSION" in str(exc).upper():
                raise Failed(f"no TLS with {self.name}: {_reason(exc)}") from exc
            raise Broken(f"the TLS connection to {self.name} broke: {_reason(exc)}") from exc
        except exceptions.ReadTimeoutError as exc:
            raise Broken(f"{self.name} was silent for too long") from exc
        except (exceptions.HTTPError, OSError) as exc:
            raise Broken(f"the connection to {self.name} broke: {_reason(exc)}") from exc

    def _refusal(self, method: str, response: Response) -> Exception:
        if response.status < _BELOW_ERRORS:  # its body may be the image: none of it is told
            response.close()
            return Refused(
                f"{self.name} answered {method} with {response.status}, which was not asked for",
                response.status,
            )
        sentence = f"{self.name} answered {method} with {response.status}: {_message(response)}"
        if response.status in _TRANSIENT:
            wait = response.headers.get("Retry-After", "")
            return Busy(sentence, float(wait) if _SECONDS.fullmatch(wait) else None)
        if response.status >= 500 and response.status != 501:  # noqa: PLR2004 - RFC 9110
            return Failed(sentence)
        return Refused(sentence, response.status)

    def finish(self, response: Response) -> None:
        """Be done with an answer: its connection is used again if little is left of the body."""
        _finish(response)

    def cut(self) -> None:
        """End all connections: threads that wait for one get ``Broken``."""
        self._sockets.cut()

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.close()


def _pool(access: Access, connections: int, sockets: _Sockets) -> HTTPConnectionPool:
    parts = urlsplit(access.url)
    seconds = access.timeout_seconds
    timeout = urllib3.Timeout(connect=seconds, read=seconds)
    host, port = str(parts.hostname), parts.port
    members: dict[str, object] = {"sockets": sockets}
    if parts.scheme == "https":
        if access.unix_socket:
            raise LocalFailure("a Unix socket is spoken to without TLS: use an http:// URL")
        pool: HTTPConnectionPool = HTTPSConnectionPool(
            host, port, timeout=timeout, maxsize=connections, ssl_context=tls_context(access)
        )
        pool.ConnectionCls = type("Tls", (_TlsConnection,), members)
        return pool
    if path := access.unix_socket:
        members["path"] = "\0" + path[1:] if path.startswith("@") else path
    pool = HTTPConnectionPool(host, port, timeout=timeout, maxsize=connections)
    pool.ConnectionCls = type("Plain", (_Connection,), members)
    return pool


def tls_context(access: Access) -> ssl.SSLContext:
    """Return what checks the server's certificate, and has ours to show."""
    try:
        context = ssl.create_default_context(cafile=access.cacert)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if access.cert:
            context.load_cert_chain(access.cert, access.key)
    except (OSError, ssl.SSLError) as exc:
        files = ", ".join(name for name in (access.cacert, access.cert, access.key) if name)
        raise LocalFailure(f"cannot use the certificates in {files}: {exc}") from exc
    return context


def _finish(response: Response) -> None:
    left = getattr(response, "length_remaining", None)
    if left is None or left > _MAX_REST:
        response.close()
    else:
        response.drain_conn()
        response.release_conn()


def _message(response: Response) -> str:
    """Return what an error's body says: our server's JSON, or another's text."""
    try:
        text = response.read(_MAX_MESSAGE)
        _finish(response)
    except (exceptions.HTTPError, OSError):
        response.close()
        return response.reason or "an answer that was cut"
    try:
        fields = json.loads(text)
        if isinstance(fields, dict):
            return str(fields.get("error") or fields.get("explanation") or fields)
    except (ValueError, RecursionError):
        pass
    first = text.decode("utf-8", "replace").strip().partition("\n")[0]
    return "".join(c for c in first if c.isprintable())[:200] or response.reason or "no reason"


def _reason(exc: BaseException) -> str:
    """Return the innermost error's words, without urllib3's wrappings."""
    while True:
        inner = next((a for a in exc.args if isinstance(a, BaseException)), None) or exc.__cause__
        if inner is None:
            break
        exc = inner
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc).rpartition("Failed to establish a new connection: ")[2] or type(exc).__name__
