# SPDX-License-Identifier: Apache-2.0
"""TLS on TCP connections: the certificate's files in, and bytes over an ``SSLSocket``.

The master makes one context, at start and at each reload, and workers inherit it by their
fork. So a worker that is replaced in between does not meet a renewal that is half written, a
renewal that is wrong leaves the server as it was, and sessions resume with any worker.

Three things differ from a plain socket, here and in ``connection.py``:

- TLS may have to read before it can write, and the other way round: ``wire.BLOCKED``;
- a record is decrypted as a whole: what nobody has read yet waits where poll(2) does not see
  it (``Connection.receive_decrypted``);
- ``SSLSocket.shutdown`` drops the encryption and would let a later ``send`` pass as plain
  text: the socket below is what gets shut down (``Connection.shutdown``).
"""

import select
import socket
import ssl
from collections.abc import Iterator
from functools import partial

from imageserver.errors import ClientGone
from imageserver.ports import HasFileno
from imageserver.server.wire import BLOCKED, Wire
from imageserver.settings import Settings

#: Neighbouring pieces up to this many bytes together are copied into one: each write costs a
#: record of its own. A head and a small range are; a piece of a large body is not.
_JOINED_BYTES = 128 * 1024


class UnusableFiles(Exception):
    """The files that the settings name make no TLS server; ``str()`` says which, and why."""


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """Return what TCP connections speak TLS with; None where they do not.

    Raises:
        UnusableFiles: a file is missing or wrong.
    """
    if not settings.tls_cert:
        for name, path in (("KEY", settings.tls_key), ("CLIENT_CA", settings.tls_client_ca)):
            if path:
                raise UnusableFiles(
                    f"IMAGESERVER_TLS_{name} is set, but IMAGESERVER_TLS_CERT is not: "
                    "set the certificate too, or neither"
                )
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client could make us work at will
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, settings.tls_cert, settings.tls_key)
    if settings.tls_client_ca:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_certificates(context, "IMAGESERVER_TLS_CLIENT_CA", settings.tls_client_ca)
    return context


def _load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    # A context of its own: what is trusted must not depend on our certificate.
    _load_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "IMAGESERVER_TLS_CERT", cert)
    named = f"IMAGESERVER_TLS_KEY={key}" if key else f"IMAGESERVER_TLS_CERT={cert}"
    try:
        # The password, where one is asked for: without it, OpenSSL would ask the terminal.
        context.load_cert_chain(cert, key or None, password="")
    except ssl.SSLError as exc:
        if exc.reason in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
            why = f"holds a key that does not belong to the certificate in {cert}"
        else:
            why = f"has no unencrypted private key for the certificate in {cert}{_reason(exc)}"
        raise UnusableFiles(f"{named} {why}") from exc
    except OSError as exc:
        raise UnusableFiles(f"{named} cannot be read ({exc.strerror})") from exc


def _load_certificates(context: ssl.SSLContext, variable: str, path: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as exc:
        raise UnusableFiles(f"{variable}={path} holds no PEM certificate{_reason(exc)}") from exc
    except OSError as exc:
        raise UnusableFiles(f"{variable}={path} cannot be read ({exc.strerror})") from exc


def _reason(exc: ssl.SSLError) -> str:
    return f" ({exc.reason.lower().replace('_', ' ')})" if exc.reason else ""


def wire_over(sock: socket.socket, timeout: float) -> Wire:
    """Return the wire that fits a client's socket."""
    return TlsWire(sock, timeout) if isinstance(sock, ssl.SSLSocket) else Wire(sock, timeout)


class TlsWire(Wire):
    """As ``Wire``, over TLS."""

    def send(self, *pieces: bytes | memoryview) -> None:
        """Send every byte of all pieces: see ``Wire``.

        OpenSSL takes a piece whole or asks for the very same piece again, however many of
        its records have gone: each wait for room is for some byte to move, as in ``Wire``.
        """
        for piece in _joined(pieces):
            view = memoryview(piece)
            while view:
                view = view[self._retry(partial(self.sock.send, view), select.POLLOUT) :]

    def recv_into(self, buffer: memoryview, until: HasFileno | None = None) -> int:
        """Fill ``buffer`` with what has arrived: see ``Wire``.

        A read brings one record, 16 KiB at most: there may be more.
        """
        filled = self._retry(partial(self.sock.recv_into, buffer), select.POLLIN, until)
        count = filled
        while count and filled < len(buffer):
            try:
                count = self.sock.recv_into(buffer[filled:])
            except BLOCKED:
                break
            except OSError as exc:
                raise ClientGone from exc
            filled += count
        return filled


def _joined(pieces: tuple[bytes | memoryview, ...]) -> Iterator[bytes | memoryview]:
    """Yield the pieces in order, neighbours as one where they are small."""
    small: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > _JOINED_BYTES:
            yield b"".join(small)
            small, size = [], 0
        small.append(piece)
        size += len(piece)
    yield small[0] if len(small) == 1 else b"".join(small)
