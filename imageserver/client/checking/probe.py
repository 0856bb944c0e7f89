# SPDX-License-Identifier: Apache-2.0
"""One connection that sends exactly what it is told: for ``imagectl check`` only.

Malformed requests are the point there, and every status is an answer. Nothing is retried, and
no connection is replaced by a new one.
"""

import contextlib
import http.client
import select
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from imageserver.client.failures import Broken, Unreachable
from imageserver.client.http.access import Access, tls_context
from imageserver.client.http.answers import parse_fields
from imageserver.client.http.connections import HANDSHAKE_SECONDS
from imageserver.client.http.connections import Reply as Paced
from imageserver.client.pace import Pace

#: Longest body that is read: a whole image in place of one byte is known by its head.
_MAX_BODY = 8 << 20
#: How long a server may take to ask for a body, in seconds; then the client sends it (RFC 9110).
_CONTINUE_SECONDS = 3.0
_CONTINUE = 100


@dataclass(frozen=True, slots=True)
class Request:
    """A request to the image's URL, with ``target`` appended."""

    method: str
    target: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer; ``body`` is None where it was too long to be read."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes | None
    continued: bool = False
    """Whether ``100 Continue`` came before."""

    @property
    def error(self) -> str | None:
        """The message of an error in JSON."""
        message = parse_fields(self.body or b"").get("error")
        return message if isinstance(message, str) else None

    @property
    def says_done(self) -> bool:
        """Whether the body is JSON that says so."""
        return parse_fields(self.body or b"").get("ok") is True


class Connection:
    """A connection to the server of a URL."""

    def __init__(self, access: Access) -> None:
        self._access = access
        parts = urlsplit(access.url)
        self.target = parts.path.rstrip("/")
        host, seconds = access.host_field, access.timeout_seconds
        self._connection = http.client.HTTPConnection(host, timeout=seconds)
        self._connection.auto_open = 0
        self._connection.response_class = Paced

    def __enter__(self) -> Self:
        parts = urlsplit(self._access.url)
        try:
            self._connection.sock = self._connect(self._access.host, parts.port, parts.scheme)
        except OSError as exc:
            raise Unreachable(f"cannot connect to {parts.netloc}: {exc.strerror or exc}") from exc
        return self

    def __exit__(self, *_exc: object) -> None:
        self._connection.close()

    def _connect(self, host: str, port: int | None, scheme: str) -> socket.socket:
        seconds = self._access.timeout_seconds
        if path := self._access.unix_address:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(seconds)
            sock.connect(path)
            return sock
        sock = socket.create_connection((host, port or (443 if scheme == "https" else 80)), seconds)
        if scheme == "https":
            sock.settimeout(min(seconds, HANDSHAKE_SECONDS))
            name = host.partition("%")[0]
            sock = tls_context(self._access).wrap_socket(sock, server_hostname=name)
            sock.settimeout(seconds)
        return sock

    def ask(self, request: Request) -> Reply:
        """Make one request."""
        self.send(request)
        return self.receive()

    def send(self, request: Request) -> None:
        """Send a request; its answer may wait."""
        target, headers = self.target + request.target, {**self._access.fields, **request.headers}
        with _translated():
            self._connection.request(request.method, target, request.body, headers)

    def receive(self) -> Reply:
        """Return the answer to the last request."""
        with _translated():
            response = self._connection.getresponse()
            body = None
            if (response.length or 0) <= _MAX_BODY:
                body = response.read(_MAX_BODY + 1)
            if body is None or len(body) > _MAX_BODY:
                self._connection.close()
                body = None
            return Reply(response.status, response.headers, body)

    def ask_expecting(self, method: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """Make a request whose body is sent once the server asks for it (100-continue)."""
        connection = self._connection
        with _translated():
            connection.putrequest(method, self.target)
            sent = {"Expect": "100-continue"} | self._access.fields | dict(headers)
            for name, value in sent.items():
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            status = self._interim()
            if status not in {0, _CONTINUE}:  # refused; its head is gone, and so is the connection
                connection.close()
                return Reply(status, http.client.HTTPMessage(), b"")
            connection.send(body)
            reply = self.receive()
        return Reply(reply.status, reply.headers, reply.body, status == _CONTINUE)

    def _interim(self) -> int:
        """Return the status that came before the body was sent; 0: none came in time."""
        sock = self._connection.sock
        if not select.select([sock], [], [], _CONTINUE_SECONDS)[0]:
            return 0
        head, pace = b"", Pace(self._access.timeout_seconds)
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)  # no more: what follows is for http.client
            if not byte:
                raise http.client.RemoteDisconnected("no answer")
            pace.came(byte)
            head += byte
        return int(head.split(maxsplit=2)[1])


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise Broken(f"the connection broke ({type(exc).__name__})") from exc
