# SPDX-License-Identifier: Apache-2.0
"""urllib3's connections (TCP, TLS, Unix socket) with what it lacks.

Sockets    all sockets of a pool, so that another thread can shut them down
Reply      an answer that is read into a buffer of ours, and fails if it comes too slowly
"""

import contextlib
import http.client
import socket
import ssl
import weakref
from typing import Any
from urllib.parse import urlsplit

import urllib3
from urllib3 import exceptions
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from imageserver.client.failures import BadUrl
from imageserver.client.http.access import Access, tls_context
from imageserver.client.pace import Pace, paced

#: How long a TLS handshake may take, in seconds: a server that expects plain HTTP would wait for
#: the end of a request.
HANDSHAKE_SECONDS = 15.0


class NoTls(exceptions.HTTPError):
    """The connection was made and the TLS handshake failed; the cause tells why."""


class Sockets:
    """The sockets of a pool's connections, and the ``Reply`` inside of each urllib3 response."""

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._replies: weakref.WeakKeyDictionary[urllib3.BaseHTTPResponse, Reply] = (
            weakref.WeakKeyDictionary()
        )

    def cut(self) -> None:
        """Shut all sockets down; threads that wait for one are woken."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS, not unwrap()

    def made(self, sock: socket.socket | None) -> None:
        """Note a new socket."""
        if sock is not None:
            self._sockets.add(sock)

    def answered(self, response: urllib3.BaseHTTPResponse, reply: "Reply") -> None:
        """Note a new answer."""
        self._replies[response] = reply

    def reply(self, response: urllib3.BaseHTTPResponse) -> "Reply":
        """Return the ``Reply`` inside of a response."""
        return self._replies[response]


class Reply(http.client.HTTPResponse):
    """An answer whose body can be read into a buffer as it comes.

    http.client has ``read1``, which allocates memory for each read, and ``readinto``, which does
    not tell how much it read before it failed.
    """

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(sock, *arguments, **named)
        self.pace = Pace(sock.gettimeout())
        self.fp = paced(self.fp, self.pace)

    def read_into(self, view: memoryview) -> int:
        """Read once into ``view``; return the number of bytes, 0 at the end of the body."""
        if self.isclosed():
            return 0
        count = self.fp.readinto1(view[: self.length])
        if self.length is not None:
            self.length -= count
        if not count or not self.length:
            self.close()
        return count


class _Noted(HTTPConnection):
    """A connection that notes its socket and its answers in ``sockets``."""

    sockets: Sockets

    def connect(self) -> None:
        """Connect."""
        super().connect()
        self.sockets.made(self.sock)

    def response_class(  # type: ignore[override]
        self,
        *arguments: Any,  # noqa: ANN401
        **named: Any,  # noqa: ANN401
    ) -> Reply:
        """Return a ``Reply``, and remember it; http.client calls this like a class."""
        self._reply = Reply(*arguments, **named)
        return self._reply

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        """Return the answer to the last request."""
        response = super().getresponse()
        self.sockets.answered(response, self._reply)
        return response


class _PlainConnection(_Noted):
    """A connection over TCP, or to a Unix socket."""

    #: The Unix socket to connect to, if any.
    path: str | None = None

    def connect(self) -> None:
        """Connect."""
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


class _TlsConnection(_Noted, HTTPSConnection):
    """A connection with TLS."""

    def connect(self) -> None:
        """Connect and shake hands.

        Raises:
            NoTls: the handshake failed.
        """
        seconds = self.timeout
        if seconds is None or isinstance(seconds, int | float):
            self.timeout = min(seconds or HANDSHAKE_SECONDS, HANDSHAKE_SECONDS)
        try:
            super().connect()
        except (exceptions.SSLError, OSError) as exc:  # of which ssl.SSLError is one
            raise NoTls("no handshake") from exc
        finally:
            self.timeout = seconds
        self.sock.settimeout(seconds)


def is_protocol_error(exc: BaseException | None) -> bool:
    """Tell whether TLS itself failed (certificate, version), rather than the connection."""
    gone = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    return isinstance(exc, ssl.SSLError) and not isinstance(exc, gone)


def make_pool(access: Access, connections: int, sockets: Sockets) -> HTTPConnectionPool:
    """Return a pool whose connections are noted in ``sockets``."""
    parts = urlsplit(access.url)
    seconds = access.timeout_seconds
    timeout = urllib3.Timeout(connect=seconds, read=seconds)
    host, port = f"[{access.host}]" if ":" in access.host else access.host, parts.port
    members: dict[str, object] = {"sockets": sockets}
    if parts.scheme == "https":
        if access.unix_socket:
            raise BadUrl("a Unix socket is spoken to without TLS: use an http:// URL")
        pool: HTTPConnectionPool = HTTPSConnectionPool(
            host, port, timeout=timeout, maxsize=connections, ssl_context=tls_context(access)
        )
        pool.ConnectionCls = type("Tls", (_TlsConnection,), members)
        return pool
    members["path"] = access.unix_address
    pool = HTTPConnectionPool(host, port, timeout=timeout, maxsize=connections)
    pool.ConnectionCls = type("Plain", (_PlainConnection,), members)
    return pool
