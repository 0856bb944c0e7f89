# SPDX-License-Identifier: Apache-2.0
"""Bytes over TLS: the same answers as in plain HTTP, wherever records begin and end."""

import contextlib
import json
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.clients import putting, read_answer
from tests.system.harness import (
    Answer,
    exchange,
    free_port,
    nbdkit,
    qemu_nbd,
    repeatable,
)
from tests.system.pki import V1_2, V1_3, TlsServer, trusting

SIZE = (5 << 20) + 512  # more than a piece, and no whole number of records
IMAGE = repeatable("tls data").randbytes(SIZE)
OTHER = repeatable("tls other").randbytes(SIZE)
JSON = {"Content-Type": "application/json"}
RECORD = 16 << 10


@pytest.fixture(scope="module")
def server(workplace: Path, pki: Path) -> Iterator[TlsServer]:
    image = workplace / "image"
    image.write_bytes(IMAGE)
    with TlsServer(workplace, pki) as running, qemu_nbd(image) as sock:
        running.add("nbd", socket=str(sock))
        running.add("nbd-read-only", socket=str(sock), read_only=True)
        yield running
        assert "Traceback" not in running.log


@pytest.fixture(params=["file", "nbd"])
def url(request, server: TlsServer, workplace: Path) -> str:
    """A writable image that holds IMAGE."""
    if request.param == "file":
        (workplace / "file").write_bytes(IMAGE)
        return server.add("file", backend="file", file=str(workplace / "file"))
    return fresh(server)


def fresh(server: TlsServer) -> str:
    """Return the NBD image, with IMAGE in it."""
    assert server.request("PUT", "/images/nbd", IMAGE).status == 200
    return "/images/nbd"


def ranged(start: int, stop: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{stop - 1}"}


def request(line: str, *fields: str, body: bytes = b"") -> bytes:
    head = [f"{line} HTTP/1.1", "Host: x", *fields]
    return "".join(f"{field}\r\n" for field in head).encode() + b"\r\n" + body


def upload(url: str, body: bytes, *fields: str) -> bytes:
    return request(f"PUT {url}", f"Content-Length: {len(body)}", *fields, body=body)


def answers(sock: socket.socket, count: int) -> list[Answer]:
    with sock.makefile("rb") as stream:
        return [read_answer(stream) for _ in range(count)]


@pytest.mark.parametrize("version", [V1_2, V1_3], ids=["1.2", "1.3"])
def test_one_connection_reads_and_writes_exact_bytes(server, url, version):
    server_context, server.context = server.context, trusting(server.directory / "pki", version)
    try:
        with contextlib.closing(server.connect()) as connection:
            assert exchange(connection, "GET", url).body == IMAGE
            put = exchange(connection, "PUT", url, OTHER)
            assert (put.status, put.json) == (200, {"ok": True, "bytes_written": SIZE})
            part = exchange(connection, "GET", url, headers=ranged(70_000, 3_000_001))
            assert (part.status, part.body) == (206, OTHER[70_000:3_000_001])
            assert exchange(connection, "HEAD", url).headers["Content-Length"] == str(SIZE)
            assert exchange(connection, "POST", f"{url}/flush").json == {"ok": True}
            assert exchange(connection, "GET", url).body == OTHER
    finally:
        server.context = server_context


def test_ranges_are_written_and_zeroed(server):
    url = fresh(server)
    with contextlib.closing(server.connect()) as connection:
        body = OTHER[: 2 * RECORD + 1]
        patch = exchange(connection, "PATCH", url, body, ranged(512, 512 + len(body)))
        assert patch.json == {"ok": True, "bytes_written": len(body)}
        zero = json.dumps({"op": "zero", "offset": 1 << 20, "size": 65536}).encode()
        assert exchange(connection, "PATCH", url, zero, JSON).json == {"ok": True}
        wanted = bytearray(IMAGE)
        wanted[512 : 512 + len(body)] = body
        wanted[1 << 20 : (1 << 20) + 65536] = bytes(65536)
        assert exchange(connection, "GET", url).body == wanted


def test_a_long_list_of_extents_is_whole(server, workplace):
    arguments = ("sparse-random", "1G", "runlength=65536", "percent=50", "seed=1")
    with nbdkit(workplace / "sparse.sock", *arguments) as sock:
        url = server.add("sparse", socket=str(sock))
        answer = server.request("GET", f"{url}/extents")
        assert answer.headers["Transfer-Encoding"] == "chunked"
        extents = answer.json
    assert len(answer.body) > 10 * RECORD
    assert extents[0]["start"] == 0
    ends = [extent["start"] + extent["length"] for extent in extents]
    assert ends == [extent["start"] for extent in extents[1:]] + [1 << 30]


def test_many_small_ranges_on_several_connections(server, url):
    def read(seed: int) -> None:
        chance = repeatable(seed)
        with contextlib.closing(server.connect()) as connection:
            for _ in range(200):
                start = chance.randrange(SIZE)
                stop = min(SIZE, start + chance.choice([1, 512, RECORD, RECORD + 1, 65536]))
                answer = exchange(connection, "GET", url, headers=ranged(start, stop))
                assert (answer.status, answer.body) == (206, IMAGE[start:stop])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))


def test_small_writes_on_several_connections_land_where_they_belong(server):
    """One lock and one slot: who is refused tries again."""
    url = fresh(server)
    part = 64 << 10

    def write(number: int) -> None:
        with contextlib.closing(server.connect()) as connection:
            for start in range(number * part, SIZE - part, 4 * part):
                body, headers = OTHER[start : start + part], ranged(start, start + part)
                while exchange(connection, "PATCH", url, body, headers).status in {409, 503}:
                    pass

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    edge = (SIZE - part - 1) // part * part + part
    assert server.request("GET", url).body == OTHER[:edge] + IMAGE[edge:]


# Where records begin and end


def test_requests_that_share_a_record_are_all_answered(server, url):
    """What is decrypted already shows on no poll; the next head may be in it."""
    body = OTHER if "nbd" in url else OTHER[:5000]
    last = body[-5000:]
    head = upload(url, body)[: -len(last)]
    with server.raw(head) as sock:
        # One record: a body's end, two requests, and half of a third.
        probe, third = request(f"OPTIONS {url}"), request(f"GET {url}")
        sock.sendall(last + probe + request(f"GET {url}") + third[:20])
        put, options, get = answers(sock, 3)
        sock.sendall(third[20:])
        (again,) = answers(sock, 1)
    assert put.json == {"ok": True, "bytes_written": len(body)}
    assert options.status == 200
    assert [get.body, again.body] == [body, body]


def test_a_body_in_records_of_a_byte_arrives(server):
    url = fresh(server)
    body = OTHER[:300]
    with server.raw() as sock:
        for byte in request(f"PATCH {url}", "Range: bytes=0-299", "Content-Length: 300", body=body):
            sock.sendall(bytes([byte]))
        assert answers(sock, 1)[0].json == {"ok": True, "bytes_written": 300}
    assert server.request("GET", url).body == body + IMAGE[300:]


def test_many_requests_sent_ahead_are_answered_in_order(server, url):
    starts = range(0, SIZE, SIZE // 97)
    asked = [request(f"GET {url}", f"Range: bytes={start}-{start + 99}") for start in starts]
    with server.raw(b"".join(asked)) as sock:
        got = [answer.body for answer in answers(sock, len(starts))]
    assert got == [IMAGE[start : start + 100] for start in starts]


def test_a_client_that_reads_slowly_gets_every_byte(server, url):
    with server.raw(request(f"GET {url}")) as sock, sock.makefile("rb", buffering=1000) as stream:
        time.sleep(0.5)  # until no buffer has room any more
        assert read_answer(stream).body == IMAGE


def test_clients_that_hang_up_leave_nothing_to_those_that_stay(home, pki):
    """Their errors are the thread's, whose next connection is another client's."""
    with (home / "image").open("wb") as image:
        image.truncate(32 << 20)  # more than any socket's buffer
    with TlsServer(home, pki, workers=1, threads=1) as server:
        url = server.add("x", backend="file", file=str(home / "image"))
        for _ in range(5):
            with server.raw(request(f"GET {url}")) as leaving:
                assert leaving.recv(100).startswith(b"HTTP/1.1 200 OK")
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # 503: the thread has yet to notice.
            tries = (server.request("GET", url) for _ in range(1000))
            answer = next(answer for answer in tries if answer.status != 503)
            assert answer.body == bytes(32 << 20)


# Uploads


def test_an_expected_100_comes_before_the_body(server, url):
    with putting(server, url, SIZE, OTHER) as (_, stream):
        assert read_answer(stream).json == {"ok": True, "bytes_written": SIZE}
    assert server.request("GET", url).body == OTHER


def test_a_refused_upload_is_told_so_before_its_body(server):
    head = upload("/images/nbd-read-only", b"", "Expect: 100-continue").replace(b": 0", b": 99")
    with server.raw(head) as sock:
        assert answers(sock, 1)[0].status == 405


def test_a_refused_client_that_sends_first_still_reads_the_answer(server):
    with server.raw() as sock:
        sock.sendall(upload("/images/nbd-read-only", bytes(32 << 20)))
        answer = answers(sock, 1)[0]
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


@pytest.mark.parametrize("has_farewell", [True, False], ids=["farewell", "cut"])
def test_a_body_that_ends_early_is_told_so_and_changes_no_file(server, workplace, has_farewell):
    (workplace / "file").write_bytes(IMAGE)
    url = server.add("file", backend="file", file=str(workplace / "file"))
    with server.raw(upload(url, OTHER)[:-1]) as sock:
        if has_farewell:
            sock.settimeout(0)
            with pytest.raises(ssl.SSLWantReadError):  # it is sent; the server's has not come
                sock.unwrap()
            sock.settimeout(30)
        socket.socket.shutdown(sock, socket.SHUT_WR)  # not SSLSocket's, which ends reading too
        (answer,) = answers(sock, 1)
    assert answer.refusal == (400, f"request body ended early at {SIZE - 1} bytes")
    assert (workplace / "file").read_bytes() == IMAGE
    assert server.holders() == []


def test_curl_uploads_and_downloads(server, url, workplace):
    (workplace / "other").write_bytes(OTHER)
    curl = ["curl", "-fsS", "--cacert", str(workplace / "pki" / "ca.crt")]
    there = f"https://localhost:{server.port}{url}"
    subprocess.run([*curl, "-T", str(workplace / "other"), there], check=True, capture_output=True)
    assert subprocess.run([*curl, there], check=True, capture_output=True).stdout == OTHER


# Unix sockets beside it


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_a_unix_socket_stays_plain(home, pki, kind):
    name = f"@is-{free_port()}" if kind == "abstract" else str(home / "http.sock")
    address = name.replace("@", "\0")
    (home / "image").write_bytes(IMAGE)
    server = TlsServer(home, pki)
    server.env["IMAGESERVER_BIND"] += f",unix:{name}"
    with server:
        url = server.add("x", backend="file", file=str(home / "image"))
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(30)
            sock.connect(address)
            sock.sendall(request(f"OPTIONS {url}") + request(f"GET {url}"))
            options, get = answers(sock, 2)
        assert options.status == 200, options.body
        assert options.json["unix_socket"] == address
        assert get.body == IMAGE
        over_tls = server.request("OPTIONS", url)
        assert over_tls.json["unix_socket"] == address
        assert server.request("GET", url).body == IMAGE
        with server.plain(request(f"GET {url}"), 10) as sock, contextlib.suppress(OSError):
            assert not sock.recv(100).startswith(b"HTTP")
