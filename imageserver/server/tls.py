# SPDX-License-Identifier: Apache-2.0
"""TLS on TCP connections: the certificate's files in, and bytes over an ``SSLSocket``.

The master makes one context at start and at each reload; workers inherit it when they are
forked. So a worker that is replaced in between does not read a certificate that is half written,
a wrong certificate leaves the old one in use, and a session can be resumed with any worker.

Four things differ from a plain socket:

- TLS may have to read before it can write, and the other way round (``wire.BLOCKED``);
- a record is decrypted as a whole: poll(2) does not report bytes that were decrypted and not yet
  read (``Connection.receive_decrypted``);
- ``SSLSocket.shutdown`` drops the encryption and would let a later ``send`` pass as plain
  text: the socket below is what gets shut down (``Connection.shutdown``);
- OpenSSL keeps errors in a queue of the *thread*, and Python leaves some there: one
  connection's error would be reported for the next one (``TlsSocket``).
"""

import contextlib
import os
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from imageserver.core.errors import ClientGone
from imageserver.core.sources import HasFileno
from imageserver.server.wire import BLOCKED, Wire
from imageserver.settings import Settings, variable_of

#: Neighbouring pieces up to this many bytes together are copied into one: each write costs a
#: record of its own. A head and a small range are; a piece of a large body is not.
_JOINED_BYTES = 128 * 1024
#: SSL_OP_ENABLE_KTLS of OpenSSL 3, which has a name since Python 3.12.
_ENABLE_KTLS = ssl.Options(0x8)
#: What poll(2) says of a connection that is broken in both directions.
_BROKEN = select.POLLERR | select.POLLHUP | select.POLLNVAL
#: A context that no connection uses: see ``forget_errors``.
_UNUSED_CONTEXT = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

T = TypeVar("T")


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
    for name in ("tls_cert", "tls_key", "tls_client_ca"):
        path = getattr(settings, name)
        if os.path.exists(path) and not os.path.isfile(path):  # a FIFO would be waited for
            raise UnusableFiles(f"{variable_of(name)}={path} cannot be read (no regular file)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = TlsSocket
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client could make us work at will
    # HTTP knows how long a body is: one that ends early gets its answer, not OpenSSL's alert.
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    if settings.ktls:
        context.options |= _ENABLE_KTLS  # without effect where OpenSSL or the kernel lacks it
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


class TlsSocket(ssl.SSLSocket):
    """A client's connection, which raises only errors of its own.

    SSL_get_error(3) reads "would block" as a failure while the thread's queue holds an error,
    even of another connection. Python raises a system error (ERR_LIB_SYS) without taking it out
    of the queue (3.13.5; OpenSSL 3.5 reports a client's reset in this way), and so may other
    users of OpenSSL. So the queue is emptied after each failure. Where neither TLS nor the
    kernel reports a problem, the action is tried again: a connection's own error comes again.
    """

    def do_handshake(self, block: bool = False) -> None:  # noqa: FBT001, FBT002 - as inherited
        """Go on with the handshake."""
        self._without_foreign_errors(partial(super().do_handshake, block))

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        """Receive."""
        return self._without_foreign_errors(partial(super().recv, buflen, flags))

    def recv_into(self, buffer: Any, nbytes: int | None = None, _flags: int = 0) -> int:
        """Receive into a buffer: the bytes of one record, 16 KiB at most."""
        # As SSLSocket does, without a frame more: this runs 65536 times a GiB.
        try:
            return int(self.read(nbytes or len(buffer), buffer))
        except BLOCKED:
            raise
        except OSError as exc:
            return int(self._again(partial(self.read, nbytes or len(buffer), buffer), exc))

    def send(self, data: Any, flags: int = 0) -> int:
        """Send."""
        return self._without_foreign_errors(partial(super().send, data, flags))

    def unwrap(self) -> socket.socket:
        """Exchange close_notify."""
        return self._without_foreign_errors(super().unwrap)

    def _without_foreign_errors(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except BLOCKED:
            raise
        except OSError as exc:
            return self._again(action, exc)

    def _again(self, action: Callable[[], T], exc: OSError) -> T:
        """Believe what an action has failed with, or try again."""
        forget_errors()
        if not (_is_of_tls(exc) or self._is_broken()):
            try:
                return action()
            except BLOCKED:
                raise
            except OSError:
                forget_errors()
        raise exc  # the first: the second may only say that there was one

    def _is_broken(self) -> bool:
        if self.fileno() < 0:
            return True
        poller = select.poll()
        poller.register(self, 0)
        return any(events & _BROKEN for _, events in poller.poll(0))


def forget_errors() -> None:
    """Empty this thread's queue of OpenSSL errors; about 20 microseconds.

    ``set_ciphers`` does so where it refuses a list, in every Python since 3.4.
    """
    with contextlib.suppress(ssl.SSLError):
        _UNUSED_CONTEXT.set_ciphers("NO-SUCH-CIPHER")


def _is_of_tls(exc: OSError) -> bool:
    """Tell whether the client broke TLS; a read after that would only say that it has ended.

    None such stays in the queue: it is system errors that Python leaves there.
    """
    return has_ended(exc) or getattr(exc, "library", None) == "SSL"


def has_ended(exc: OSError) -> bool:
    """Tell whether TLS failed for nothing but the connection's end."""
    return isinstance(exc, ssl.SSLEOFError | ssl.SSLZeroReturnError)


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
    """Yield the pieces in order, small neighbours joined."""
    small: list[bytes | memoryview] = []
    size = 0
    for piece in pieces:
        if size + len(piece) > _JOINED_BYTES:
            yield b"".join(small)
            small, size = [], 0
        small.append(piece)
        size += len(piece)
    yield small[0] if len(small) == 1 else b"".join(small)
