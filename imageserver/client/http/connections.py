# SPDX-License-Identifier: Apache-2.0
"""What urllib3's pools are made of here.

Connections over TCP, TLS or a Unix socket whose sockets others can shut down, and answers that
can be read into a buffer that is used again, and that come at a least rate.
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

#: How long a handshake may take: a port that does not speak TLS may wait for the rest of what it
#: takes for a request.
HANDSHAKE_SECONDS = 15.0


class NoTls(exceptions.HTTPError):
    """There is a connection, but no handshake; the cause tells why."""


class Sockets:
    """The sockets of a pool's connections: a thread that waits for one is woken by its end.

    Also which answer of ours is inside of which one of urllib3's.
    """

    def __init__(self) -> None:
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._replies: weakref.WeakKeyDictionary[urllib3.BaseHTTPResponse, Reply] = (
            weakref.WeakKeyDictionary()
        )

    def cut(self) -> None:
        """End all connections, whoever is using them."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS, not unwrap()

    def made(self, sock: socket.socket | None) -> None:
        """Note a new one."""
        if sock is not None:
            self._sockets.add(sock)

    def answered(self, response: urllib3.BaseHTTPResponse, reply: "Reply") -> None:
        """Note a new answer."""
        self._replies[response] = reply

    def reply(self, response: urllib3.BaseHTTPResponse) -> "Reply":
        """Return our part of an answer."""
        return self._replies[response]


class Reply(http.client.HTTPResponse):
    """An answer whose body can be read into a buffer as it comes.

    http.client has ``read1`` for that, which makes an object of its own for each read, and
    ``readinto``, of which nobody knows how far it came when it fails.
    """

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:  # noqa: ANN401
        super().__init__(sock, *arguments, **named)
        self.pace = Pace(sock.gettimeout())
        self.fp = paced(self.fp, self.pace)

    def read_into(self, view: memoryview) -> int:
        """Fill some of ``view`` by at most one read; return how much, 0 at the body's end."""
        if self.isclosed():
            return 0
        count = self.fp.readinto1(view[: self.length])
        if self.length is not None:
            self.length -= count
        if not count or not self.length:
            self.close()
        return count


class _Noted(HTTPConnection):
    """A connection that says which socket it has, and which answers it got."""

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
        """Make an answer, and remember it: http.client calls this like a class."""
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
            NoTls: that failed once the other side was there.
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
    """Tell whether a handshake failed for what the other side is or wants, not for its absence."""
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
    if path := access.unix_socket:
        members["path"] = "\0" + path[1:] if path.startswith("@") else path
    pool = HTTPConnectionPool(host, port, timeout=timeout, maxsize=connections)
    pool.ConnectionCls = type("Plain", (_PlainConnection,), members)
    return pool
