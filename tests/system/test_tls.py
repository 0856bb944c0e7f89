# SPDX-License-Identifier: Apache-2.0
"""TLS (docs/api.md): who is let in, whom a silent client delays, which certificate is shown."""

import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import read_answer
from tests.system.disks import sparse
from tests.system.harness import qemu_nbd, repeatable, wait_until
from tests.system.pki import V1_2, V1_3, TlsServer, files, make_pki, trusting

IMAGE = repeatable("tls").randbytes(3 << 20)
GET = b"GET /images/x HTTP/1.1\r\nHost: x\r\n\r\n"
OPTIONS = b"OPTIONS /images/x HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"OPTIONS /images/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def foreign(workplace: Path) -> Path:
    return make_pki(workplace / "foreign")


@contextlib.contextmanager
def serving(home: Path, pki: Path, **settings: object) -> Iterator[TlsServer]:
    (home / "image").write_bytes(IMAGE)
    with TlsServer(home, pki, **settings) as server:
        server.add("x", backend="file", file=str(home / "image"))
        yield server
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def server(workplace: Path, pki: Path) -> Iterator[TlsServer]:
    with serving(Path(tempfile.mkdtemp(dir=workplace)), pki) as running:
        yield running


@pytest.fixture(scope="module")
def strict(workplace: Path, pki: Path) -> Iterator[TlsServer]:
    """A server that wants certificates."""
    home = Path(tempfile.mkdtemp(dir=workplace))
    with serving(home, pki, **files(pki, client_ca=True)) as running:
        yield running


def answer_on(sock: socket.socket) -> int:
    with sock, sock.makefile("rb") as stream:
        return read_answer(stream).status


def read_to_end(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


# Versions and certificates


@pytest.mark.parametrize("name", ["TLSv1", "TLSv1_1"])
def test_old_versions_are_refused_and_told_why(server, pki, name):
    with pytest.raises(ssl.SSLError, match="alert protocol version"):
        server.greet(trusting(pki, ssl.TLSVersion[name]))


@pytest.mark.parametrize("version", [V1_2, V1_3], ids=["1.2", "1.3"])
def test_present_versions_are_accepted(server, pki, version):
    with server.greet(trusting(pki, version), OPTIONS) as sock:
        assert sock.version() == version.name.replace("_", ".")
        assert answer_on(sock) == 200


def test_the_server_proves_its_name_to_curl(server, pki):
    url = f"https://localhost:{server.port}/images/x"
    command = ["curl", "-fsS", "--cacert", str(pki / "ca.crt"), url]
    assert subprocess.run(command, check=True, capture_output=True).stdout == IMAGE
    del command[2:4]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 60


@pytest.mark.parametrize("version", [V1_2, V1_3], ids=["1.2", "1.3"])
def test_a_required_client_certificate_lets_in(strict, pki, version):
    with strict.greet(trusting(pki, version, own=pki), OPTIONS) as sock:
        assert answer_on(sock) == 200


@pytest.mark.parametrize("version", [V1_2, V1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize(
    ("has_one", "alert"),
    [
        pytest.param(False, "alert (certificate required|handshake failure)", id="missing"),
        pytest.param(True, "alert unknown ca", id="foreign"),
    ],
)
def test_without_the_right_client_certificate_the_alert_says_why(
    strict, pki, foreign, version, has_one, alert
):
    context = trusting(pki, version, own=foreign if has_one else None)
    # With TLS 1.3 a client learns of it after it has sent its request.
    with pytest.raises(ssl.SSLError, match=alert):
        answer_on(strict.greet(context, GET))


@pytest.mark.parametrize("version", [V1_2, V1_3], ids=["1.2", "1.3"])
def test_a_session_resumes_with_any_worker(strict, pki, version):
    context = trusting(pki, version, own=pki)
    workers, session = set(), None
    for _ in range(20):
        with strict.greet(context, OPTIONS, session=session) as sock, sock.makefile("rb") as stream:
            assert read_answer(stream).status == 200  # with which the ticket has come
            assert sock.session_reused == (session is not None)
            workers.add(strict.worker_of(sock))
            session = session or sock.session
    assert len(workers) > 1


# Clients that do not get on


def test_silent_handshakes_delay_nobody_and_cost_no_thread(home, pki):
    with (
        serving(home, pki, workers=1, threads=1) as server,
        contextlib.ExitStack() as stack,
    ):
        assert server.request("GET", "/images/x").body == IMAGE
        assert server.request("OPTIONS", "/images/x").status == 200
        (worker,) = server.worker_pids()
        before = len(os.listdir(f"/proc/{worker}/task"))
        for number in range(50):
            began = b"\x16\x03\x01\x02\x00\x01" if number % 2 else b""  # some of a ClientHello
            stack.enter_context(server.plain(began))
        wait_until(lambda: len(os.listdir(f"/proc/{worker}/fd")) > 50)
        for _ in range(5):
            for method in ("OPTIONS", "GET"):
                began = time.monotonic()
                assert server.request(method, "/images/x").status == 200
                assert time.monotonic() - began < 1
        after = len(os.listdir(f"/proc/{worker}/task"))
        assert after <= before + 7, "probe threads may have come, eight at most"


@pytest.mark.parametrize("data", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "half"])
def test_a_handshake_takes_no_longer_than_a_head_may(home, pki, data):
    with serving(home, pki, client_timeout=0.5) as server, server.plain(data, 10) as sock:
        began = time.monotonic()
        assert sock.recv(1) == b""
        assert 0.4 < time.monotonic() - began < 3


@pytest.mark.parametrize(
    "data", [GET, os.urandom(5), b"\x16\x03\x01\x00\x05hello"], ids=["http", "noise", "nonsense"]
)
def test_what_is_not_tls_is_closed_at_once(server, data):
    with server.plain(data, 10) as sock, contextlib.suppress(ConnectionResetError):
        sock.shutdown(socket.SHUT_WR)
        while piece := sock.recv(4096):
            assert piece[:1] == b"\x15", "nothing but a TLS alert"
    assert server.request("OPTIONS", "/images/x").status == 200


def test_a_head_that_takes_too_long_is_told_over_tls(home, pki):
    with serving(home, pki, client_timeout=0.5) as server:
        sock = server.raw(b"GET /images/x HT")
        with sock, sock.makefile("rb") as stream:
            assert read_answer(stream).refusal == (408, "request head took too long")
            assert sock.recv(1) == b"", "and a farewell"


def test_a_full_server_says_so_over_tls(home, pki):
    with serving(home, pki, workers=1, threads=1) as server:
        head = b"PUT /images/x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
        with server.raw(head + b"Expect: 100-continue\r\n\r\n") as busy, busy.makefile() as stream:
            assert stream.readline() == "HTTP/1.1 100 Continue\n"
            refused = server.request("GET", "/images/x")
            assert refused.refusal == (503, "server busy")
            assert server.request("OPTIONS", "/images/x").status == 200


# The end of a connection


def test_a_last_answer_ends_with_a_farewell(server):
    with server.raw(LAST) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).status == 200
        assert stream.read() == b""


@pytest.mark.parametrize("later", [0.0, 0.3], ids=["at once", "later"])
def test_a_farewell_is_answered_with_one(server, later):
    """RFC 8446 section 6.1; after the answer a thread has the connection, later the loop."""
    with server.raw(OPTIONS, 5) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).status == 200
        time.sleep(later)
        sock.unwrap().close()


def test_an_idle_connection_ends_with_a_farewell(home, pki):
    with (
        serving(home, pki, keepalive=1) as server,
        server.raw(OPTIONS, 10) as sock,
        sock.makefile("rb") as stream,
    ):
        assert read_answer(stream).status == 200
        assert stream.read() == b""


def test_an_answer_that_fails_on_its_way_is_cut_without_a_farewell(home, pki):
    size = 64 << 20
    sparse(home / "big", size)
    with serving(home, pki) as server, contextlib.ExitStack() as stack:
        nbd = stack.enter_context(contextlib.ExitStack())
        sock = nbd.enter_context(qemu_nbd(home / "big"))
        server.add("big", socket=str(sock))
        client = stack.enter_context(server.raw(GET.replace(b"/x ", b"/big ")))
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        nbd.close()
        with pytest.raises((ConnectionResetError, ssl.SSLEOFError)):
            read_to_end(client)
        assert wait_until(lambda: server.holders() == [])


# Renewal


def shown(server: TlsServer) -> bytes:
    """Return the certificate that a new connection gets to see."""
    with server.raw() as sock:
        certificate = sock.getpeercert(binary_form=True)
        assert certificate is not None
        return certificate


def reload(server: TlsServer) -> None:
    before = server.log_path.stat().st_size
    assert server.process is not None
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server._accepting(before) == server.workers)


def test_a_renewed_certificate_is_shown_after_a_reload_while_a_transfer_runs(home):
    pki = make_pki(home / "pki")
    size = 64 << 20
    big = repeatable("renewal").randbytes(1 << 20) * 64
    with qemu_image(home, big) as sock, serving(home, pki) as server:
        server.add("big", socket=str(sock))
        old = shown(server)
        with server.raw(GET.replace(b"/x ", b"/big ")) as client, server.raw() as idle:
            stream = client.makefile("rb")
            response = http.client.HTTPResponse(client)
            response.begin()
            assert response.read(1000) == big[:1000]
            (pki / "server.crt").unlink()
            make_pki(pki)
            assert shown(server) == old, "not before the reload"
            reload(server)
            wait_until(lambda: shown(server) != old)
            assert {shown(server) for _ in range(9)} == {shown(server)}
            assert response.read() == big[1000:size]
            idle.sendall(OPTIONS)
            assert answer_on(idle) == 200, "an old connection is served to its end"
            stream.close()


@contextlib.contextmanager
def qemu_image(home: Path, data: bytes) -> Iterator[Path]:
    (home / "big").write_bytes(data)
    with qemu_nbd(home / "big") as sock:
        yield sock


def test_a_renewal_that_is_wrong_or_half_done_leaves_the_server_as_it_was(home):
    pki = make_pki(home / "pki")
    with serving(home, pki, workers=2) as server:
        old = shown(server)
        (pki / "server.key").write_text("half a k")
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: server._accepting(0) == 4)
        assert shown(server) == old
        reload(server)
        assert shown(server) == old
        assert f"IMAGESERVER_TLS_KEY={pki}/server.key has no unencrypted private key" in server.log
        (pki / "server.key").unlink()
        make_pki(pki)
        reload(server)
        assert wait_until(lambda: shown(server) != old)
