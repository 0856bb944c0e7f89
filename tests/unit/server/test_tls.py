# SPDX-License-Identifier: Apache-2.0
"""TLS below the server: a wire's pieces and records, what is decrypted early, the scheme."""

import contextlib
import ctypes
import errno
import select
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import Config

from imageserver.core.errors import ClientGone
from imageserver.server import wire as module
from imageserver.server.connection import Connection
from imageserver.server.environ import Gateway
from imageserver.server.exchange import serve
from imageserver.server.tls import (
    TlsWire,
    forget_errors,
    has_ended,
    server_context,
    wire_over,
)
from imageserver.server.wire import Wire
from imageserver.settings import Settings

ROOT = Path(__file__).parents[3]
RECORD = 16 << 10


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    subprocess.run([ROOT / "scripts" / "make-pki", directory], check=True)
    return directory


@pytest.fixture(scope="module")
def context(pki: Path) -> ssl.SSLContext:
    return context_of(pki)


def context_of(pki: Path, **more: Any) -> ssl.SSLContext:
    crt, key = (str(pki / name) for name in ("server.crt", "server.key"))
    made = server_context(Settings(tls_cert=crt, tls_key=key, **more))
    assert made is not None
    return made


@contextlib.contextmanager
def greeted(
    pki: Path, context: ssl.SSLContext, below: socket.socket, above: socket.socket
) -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    """A client's end, which blocks, and the server's, which does not."""
    trusting = ssl.create_default_context(cafile=pki / "ca.crt")
    trusting.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # an end is an end
    with above:
        ours = context.wrap_socket(above, server_side=True, do_handshake_on_connect=False)
        helper = threading.Thread(target=ours.do_handshake)
        helper.start()
        with trusting.wrap_socket(below, server_hostname="localhost") as client, ours:
            helper.join()
            ours.settimeout(0)
            client.settimeout(10)
            yield client, ours


@pytest.fixture
def ends(pki: Path, context: ssl.SSLContext) -> Iterator[tuple[ssl.SSLSocket, ssl.SSLSocket]]:
    with greeted(pki, context, *socket.socketpair()) as pair:
        yield pair


def over_tcp() -> tuple[socket.socket, socket.socket]:
    """Return the client's and the server's end of a connection that can be reset."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def leave_error(library: int = 2, reason: int = errno.ECONNRESET) -> None:
    """Leave an error in this thread's queue, as Python 3.13.5 does; 2: ERR_LIB_SYS."""
    crypto = ctypes.CDLL("libcrypto.so.3")  # which Python's ssl has loaded already
    crypto.ERR_new()
    crypto.ERR_set_error(library, reason, None)


def read_exactly(client: socket.socket, count: int) -> bytes:
    with client.makefile("rb") as stream:
        return stream.read(count)


def test_without_a_certificate_there_is_no_context():
    assert server_context(Settings()) is None


def test_a_context_speaks_what_the_contract_promises(context):
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_IGNORE_UNEXPECTED_EOF
    assert context.verify_mode is ssl.CERT_NONE


def test_where_the_kernel_may_encrypt_but_cannot_openssl_does(pki, context):
    kernels = context_of(pki, ktls=True)
    assert [made.options & 0x8 for made in (context, kernels)] == [0, 8]  # SSL_OP_ENABLE_KTLS
    # A pair of Unix sockets: no kernel has TLS there.
    with greeted(pki, kernels, *socket.socketpair()) as (client, ours):
        TlsWire(ours, 10).send(b"head", b"body")
        assert client.recv(100) == b"headbody"
        client.sendall(b"request")
        assert TlsWire(ours, 10).recv_into(memoryview(bytearray(100))) == 7


def test_each_socket_gets_the_wire_that_fits(ends):
    assert type(wire_over(ends[1], 1)) is TlsWire
    left, right = socket.socketpair()
    with left, right:
        assert type(wire_over(left, 1)) is Wire


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([], id="nothing"),
        pytest.param([0, 0], id="empty"),
        pytest.param([200], id="head"),
        pytest.param([200, 65536], id="head-and-range"),
        pytest.param([200, 128 << 10], id="just-too-large-to-join"),
        pytest.param([200, 5, 1 << 20, 2], id="chunk"),
        pytest.param([0, 3 << 20, 0, 1], id="large"),
    ],
)
def test_pieces_arrive_in_order(ends, sizes):
    client, ours = ends
    pieces = [memoryview(bytes([number + 1]) * size) for number, size in enumerate(sizes)]
    wanted = b"".join(pieces)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(read_exactly(client, len(wanted))))
    reader.start()
    TlsWire(ours, 10).send(*pieces)
    reader.join()
    assert received == [wanted]


def test_a_head_and_a_small_body_are_one_record(ends):
    client, ours = ends
    TlsWire(ours, 10).send(b"head", b"", memoryview(b"body"))
    assert client.recv(100) == b"headbody"


def test_a_client_that_takes_nothing_is_given_up(ends):
    _, ours = ends
    with pytest.raises(ClientGone):
        TlsWire(ours, 0.2).send(bytes(16 << 20))


def test_a_client_that_sends_nothing_is_given_up(ends):
    _, ours = ends
    with pytest.raises(ClientGone):
        TlsWire(ours, 0.2).recv_into(memoryview(bytearray(10)))


def test_bytes_that_make_no_whole_record_are_no_progress(ends, monkeypatch):
    client, ours = ends
    record = iter(b"\x17\x03\x03\x40\x00" + bytes(RECORD))
    seconds, real = 0.0, module.wait

    def dribble(sock, events, *_):
        nonlocal seconds
        seconds += 1
        socket.socket.send(client, bytes([next(record)]))  # below TLS
        return real(sock, events, 1)

    monkeypatch.setattr(module, "wait", dribble)
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds)
    with pytest.raises(ClientGone):
        TlsWire(ours, 5.0).recv_into(memoryview(bytearray(10)))
    assert seconds == 5


def test_one_read_takes_every_record_that_is_there(ends):
    client, ours = ends
    for number in range(4):
        client.sendall(bytes([number]) * RECORD)
    buffer = memoryview(bytearray(10 * RECORD))
    assert TlsWire(ours, 10).recv_into(buffer) == 4 * RECORD
    assert buffer[: 4 * RECORD] == b"".join(bytes([number]) * RECORD for number in range(4))


@pytest.mark.parametrize("rest", [b"", b"\x17\x03\x03\x40\x00half"], ids=["whole", "half-record"])
def test_the_end_is_told_after_the_last_bytes_and_ever_after(ends, rest):
    client, ours = ends
    client.sendall(b"last")
    socket.socket.sendall(client, rest)
    socket.socket.shutdown(client, socket.SHUT_WR)
    wire, buffer = TlsWire(ours, 10), memoryview(bytearray(100))
    assert [wire.recv_into(buffer) for _ in range(3)] == [4, 0, 0]
    wire.send(b"ended early")
    assert client.recv(100) == b"ended early"


def test_what_is_decrypted_and_on_no_poll_is_found(ends):
    client, ours = ends
    client.sendall(b"bodyGET / HTTP/1.1\r\n\r\n")
    conn = Connection(ours, ("client", 1), ("server", 2))
    assert TlsWire(ours, 10).recv_into(memoryview(bytearray(4))) == 4
    poller = select.poll()
    poller.register(ours, select.POLLIN)
    assert poller.poll(0) == [], "or this test proves nothing"
    conn.receive_decrypted()
    assert conn.buffer == b"GET / HTTP/1.1\r\n\r\n"
    assert conn.has_head()


# Errors of other connections


def test_an_error_left_by_others_looks_like_this_connections(ends):
    """Or the tests below prove nothing."""
    leave_error()
    try:
        with pytest.raises(OSError) as raised:  # noqa: PT011 - which one depends on Python
            ssl.SSLSocket.recv(ends[1], 1)
        assert not isinstance(raised.value, ssl.SSLWantReadError)
    finally:
        forget_errors()


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        pytest.param(2, errno.ECONNRESET, id="system-reset"),
        pytest.param(2, errno.EPIPE, id="system-pipe"),
        pytest.param(9, 108, id="pem-no-start-line"),
    ],
)
def test_an_error_left_by_others_is_not_believed(ends, library, reason):
    client, ours = ends
    wire, conn = TlsWire(ours, 10), Connection(ours, ("client", 1), ("server", 2))
    leave_error(library, reason)
    with pytest.raises(ssl.SSLWantReadError):
        conn.receive()
    leave_error(library, reason)
    with pytest.raises(ssl.SSLWantReadError):
        ours.recv_into(bytearray(1))
    client.sendall(b"body")
    leave_error(library, reason)
    assert wire.recv_into(memoryview(bytearray(100))) == 4
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(read_exactly(client, 8 << 20)))
    reader.start()
    leave_error(library, reason)
    wire.send(bytes(8 << 20))  # more than fits: the wire has to wait
    reader.join()
    assert received == [bytes(8 << 20)]


def test_a_handshake_that_waits_does_not_believe_an_error_of_others(context):
    below, above = socket.socketpair()
    with below, context.wrap_socket(above, server_side=True, do_handshake_on_connect=False) as ours:
        ours.settimeout(0)
        conn = Connection(ours, ("client", 1), ("server", 2))
        leave_error()
        with pytest.raises(ssl.SSLWantReadError):
            conn.shake_hands()


@pytest.mark.parametrize("size", [0, 20])
def test_a_handshake_that_ends_early_is_an_end_and_no_failure_of_tls(context, size):
    below, above = socket.socketpair()
    with context.wrap_socket(above, server_side=True, do_handshake_on_connect=False) as ours:
        ours.settimeout(0)
        below.sendall(b"\x16\x03\x01\x01\x00\x01\x00\x00\xfc\x03\x03"[:size])
        below.shutdown(socket.SHUT_WR)
        with below, pytest.raises(OSError) as raised:  # noqa: PT011 - which one depends
            Connection(ours, ("client", 1), ("server", 2)).shake_hands()
    assert has_ended(raised.value)


def test_many_clients_hang_up_and_the_next_one_of_the_thread_is_served(pki, context):
    with greeted(pki, context, *socket.socketpair()) as (client, ours):
        for number in range(20):
            with greeted(pki, context, *over_tcp()) as (leaving, theirs):
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                leaving.close()
                with pytest.raises(ClientGone):
                    TlsWire(theirs, 10).send(bytes(16 << 20))
                Connection(theirs, ("client", 1), ("server", 2)).send_close_notify()
            with pytest.raises(ssl.SSLWantReadError):
                ours.recv(1)
            TlsWire(ours, 10).send(bytes([number]))
            assert client.recv(10) == bytes([number])


def test_a_connections_own_error_stays_its_own(pki, context):
    with greeted(pki, context, *socket.socketpair()) as (client, ours):
        socket.socket.sendall(client, b"no record of TLS at all")
        with pytest.raises(ssl.SSLError) as raised:
            Connection(ours, ("client", 1), ("server", 2)).receive()
        assert raised.value.library == "SSL"


def test_shutting_down_lets_nothing_pass_as_plain_text(ends):
    client, ours = ends
    conn = Connection(ours, ("client", 1), ("server", 2))
    conn.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ClientGone):
        TlsWire(ours, 1).send(b"secret")
    # Below TLS: what OpenSSL makes of such an end differs between its versions.
    below = socket.socket(fileno=client.detach())
    with below, below.makefile("rb") as stream:
        assert b"secret" not in stream.read()  # but session tickets, which end


def test_the_application_hears_of_https(ends):
    client, ours = ends
    heard = []

    def app(environ, start_response):
        heard.append((environ["wsgi.url_scheme"], environ["SERVER_PORT"]))
        start_response("204 No Content", [])
        return []

    conn = Connection(ours, ("client", 1), ("server", 2))
    conn.buffer += b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert serve(conn, TlsWire(ours, 1), app, Gateway(Config()), lambda: False)
    assert client.recv(100).startswith(b"HTTP/1.1 204 No Content\r\n")
    assert heard == [("https", "2")]


def test_the_example_in_conf_parses():
    lines = (ROOT / "conf" / "tls.env").read_text().splitlines()
    shown = [line.lstrip("#") for line in lines if line.lstrip("#").startswith("IMAGESERVER_")]
    settings = Settings.from_environ(dict(line.split("=", 1) for line in shown))
    assert settings.tls_cert
    assert settings.tls_key
    assert settings.tls_client_ca
    assert settings.unix_socket
