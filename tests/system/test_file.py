# SPDX-License-Identifier: Apache-2.0
"""The file backend: the bytes of a file as they are, replaced as a whole or not at all."""

import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import putting, read_answer, reading
from tests.system.harness import Server, repeatable, wait_until
from tests.system.skips import needs

SIZE = 200_000
OLD = repeatable("old").randbytes(SIZE)
NEW = repeatable("new").randbytes(SIZE + 4321)
BIG = 64 << 20  # more than the socket buffers of a connection hold
FULL_WRITES_ONLY = "Range/Content-Range not supported; full writes only"
NO_RANGE_WRITES = "range writes and PATCH not supported for file backend; use PUT for full upload"


@pytest.fixture
def directory(workplace: Path) -> Iterator[Path]:
    path = workplace / "images"
    path.mkdir()
    yield path
    for left in path.iterdir():
        left.unlink() if not left.is_dir() else left.rmdir()
    path.rmdir()


@pytest.fixture
def image(directory: Path) -> Path:
    path = directory / "disk.raw"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def url(server: Server, image: Path) -> str:
    return server.add("disk", backend="file", file=str(image))


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_get_sends_the_whole_file(server, url):
    answer = server.request("GET", url)
    assert (answer.status, answer.body) == (200, OLD)
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Length"] == str(SIZE)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, PUT, OPTIONS"


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        pytest.param("bytes=0-0", 0, 1, id="first byte"),
        pytest.param("bytes=1000-65535", 1000, 65536, id="inside"),
        pytest.param(f"bytes={SIZE - 1}-", SIZE - 1, SIZE, id="open end"),
        pytest.param("bytes=-5", SIZE - 5, SIZE, id="suffix"),
        pytest.param("bytes=7-999999999", 7, SIZE, id="clipped"),
    ],
)
def test_a_range_is_that_slice_of_the_file(server, url, header, start, stop):
    answer = server.request("GET", url, headers={"Range": header})
    assert (answer.status, answer.body) == (206, OLD[start:stop])
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["Content-Length"] == str(stop - start)


def test_a_range_beyond_the_file_is_416(server, url):
    answer = server.request("GET", url, headers={"Range": f"bytes={SIZE}-"})
    assert answer.refusal == (416, "range not satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"


def test_head_has_the_headers_of_a_whole_get_and_no_body(server, url):
    got = server.request("GET", url)
    answer = server.request("HEAD", url, headers={"Range": "bytes=0-0"})
    assert (answer.status, answer.body) == (200, b"")
    unlike = {"Date", "x-request-id"}
    assert {k: v for k, v in answer.headers.items() if k not in unlike} == {
        k: v for k, v in got.headers.items() if k not in unlike
    }


def test_options_announces_flush_and_one_writer(server, url):
    answer = server.request("OPTIONS", url)
    assert answer.status == 200
    assert answer.body == (
        b'{"unix_socket":null,"features":["flush","digest","checksum"],"max_readers":8,"max_writers":1}'
    )
    assert answer.headers["Access-Control-Allow-Methods"] == "GET, PUT, POST, OPTIONS"
    allowed = set(answer.headers["Allow"].split(", "))
    assert allowed == {"GET", "HEAD", "PUT", "POST", "OPTIONS"}


def test_options_answers_for_a_file_that_lacks(server, directory):
    url = server.add("lacking", backend="file", file=str(directory / "none"))
    assert server.request("OPTIONS", url).json["features"] == ["flush", "digest", "checksum"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(NEW, id="longer"),
        pytest.param(NEW[:1000], id="shorter"),
        pytest.param(b"", id="empty"),
        pytest.param(OLD[:70_000] + bytes(130_000), id="zeros at the end"),
    ],
)
def test_put_replaces_the_file_by_its_body(server, url, image, directory, body):
    answer = server.request("PUT", url, body)
    assert answer.status == 200
    assert answer.body == b'{"ok":true,"bytes_written":%d}' % len(body)
    assert answer.headers["Content-Type"] == "application/json"
    assert image.read_bytes() == body
    assert server.request("GET", url).body == body
    assert names(directory) == ["disk.raw"]


def test_put_keeps_mode_and_symlink_target(server, image, directory):
    image.chmod(0o640)
    (directory / "link").symlink_to("disk.raw")
    url = server.add("linked", backend="file", file=str(directory / "link"))
    assert server.request("PUT", url, NEW).status == 200
    assert os.readlink(directory / "link") == "disk.raw"
    assert image.stat(follow_symlinks=False).st_mode == 0o100640
    assert image.read_bytes() == NEW
    assert names(directory) == ["disk.raw", "link"]


@needs("owners")
def test_put_keeps_owner_and_set_id_bits(server, url, image):
    os.chown(image, 12345, 23456)
    image.chmod(0o4711)
    assert server.request("PUT", url, NEW).status == 200
    found = image.stat()
    assert (found.st_uid, found.st_gid, found.st_mode) == (12345, 23456, 0o104711)


@needs("xattrs")
def test_put_keeps_extended_attributes(server, url, image):
    os.setxattr(image, "user.purpose", b"\0backup\xff")
    assert server.request("PUT", url, NEW).status == 200
    assert {n: os.getxattr(image, n) for n in os.listxattr(image)} == {
        "user.purpose": b"\0backup\xff"
    }


def test_put_makes_a_missing_file_for_its_owner_alone(server, directory):
    url = server.add("fresh", backend="file", file=str(directory / "fresh.raw"))
    assert server.request("PUT", url, NEW).status == 200
    assert (directory / "fresh.raw").read_bytes() == NEW
    assert (directory / "fresh.raw").stat().st_mode == 0o100600


def test_readers_see_the_old_file_until_the_body_is_complete(server, url, image):
    with image.open("rb") as already_open, putting(server, url, len(NEW), NEW[:-1]) as (sock, body):
        assert server.request("GET", url).body == OLD
        assert image.read_bytes() == OLD
        sock.sendall(NEW[-1:])
        assert read_answer(body).json == {"ok": True, "bytes_written": len(NEW)}
        assert already_open.read() == OLD
    assert server.request("GET", url).body == NEW


def test_a_read_that_began_before_a_put_ends_with_the_old_bytes(server, url, image):
    image.write_bytes(b"o" * BIG)
    with reading(server, url) as sock:
        assert server.request("PUT", url, NEW).status == 200
        sock.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: sock.recv(1 << 20), b""))
        assert received == b"o" * BIG


@pytest.mark.parametrize("is_there", [True, False], ids=["old file", "no file"])
def test_a_body_that_ends_early_changes_nothing(server, directory, is_there):
    if is_there:
        (directory / "x").write_bytes(OLD)
    before = names(directory)
    url = server.add("early", backend="file", file=str(directory / "x"))
    with putting(server, url, SIZE, NEW[:1234]) as (sock, stream):
        sock.shutdown(socket.SHUT_WR)
        answer = read_answer(stream)
    assert answer.refusal == (400, "request body ended early at 1234 bytes")
    assert names(directory) == before
    assert not is_there or (directory / "x").read_bytes() == OLD


def test_a_client_that_vanishes_changes_nothing_and_holds_nothing(server, url, image, directory):
    with putting(server, url, SIZE, NEW[:1234]) as (sock, _):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: not server.holders())
    assert (names(directory), image.read_bytes()) == (["disk.raw"], OLD)
    assert server.request("PUT", url, NEW).status == 200


def test_a_worker_that_dies_in_a_put_leaves_the_old_file_and_nothing_else(
    server, url, image, directory
):
    with putting(server, url, SIZE, NEW[:1234]) as (sock, stream):
        os.kill(server.worker_of(sock), signal.SIGKILL)
        with pytest.raises((AssertionError, ConnectionError)):
            read_answer(stream)
    assert (names(directory), image.read_bytes()) == (["disk.raw"], OLD)
    wait_until(lambda: not server.holders())
    assert server.request("PUT", url, NEW).status == 200
    assert names(directory) == ["disk.raw"]


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        pytest.param({"Range": "bytes=0-9"}, FULL_WRITES_ONLY, id="Range"),
        pytest.param({"Content-Range": "bytes 0-9/*"}, FULL_WRITES_ONLY, id="Content-Range"),
        pytest.param({"Content-Length": "+10"}, "Invalid Content-Length", id="signed length"),
        pytest.param({"Content-Length": "1_0"}, "Invalid Content-Length", id="underscore"),
        pytest.param({"Content-Length": f"{2**64}"}, "Invalid Content-Length", id="beyond off_t"),
        pytest.param({"Transfer-Encoding": "chunked"}, "Content-Length required", id="chunked"),
        pytest.param({}, "Content-Length required", id="no length"),
    ],
)
def test_a_put_that_is_not_a_whole_image_is_400_and_changes_nothing(
    server, url, image, headers, message
):
    fields = {"Host": "x", "Content-Length": "10"} | headers
    if "Transfer-Encoding" in headers or not headers:
        del fields["Content-Length"]
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    with server.raw(f"PUT {url} HTTP/1.1\r\n{head}\r\n".encode()) as sock:
        assert read_answer(sock.makefile("rb")).refusal == (400, message)
    assert image.read_bytes() == OLD


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param({"Range": "bytes=0-2"}, b"abc", id="range write"),
        pytest.param({"Content-Type": "application/json"}, b'{"op":"flush"}', id="flush"),
        pytest.param({"Content-Type": "application/json"}, b"{", id="bad JSON"),
        pytest.param({}, b"", id="neither"),
    ],
)
def test_patch_is_400_for_files(server, url, image, headers, body):
    assert server.request("PATCH", url, body, headers).refusal == (400, NO_RANGE_WRITES)
    assert image.read_bytes() == OLD


@pytest.mark.parametrize("query", ["", "?context=zero", "?context=dirty"])
def test_extents_are_400_for_files(server, url, query):
    answer = server.request("GET", f"{url}/extents{query}")
    assert answer.refusal == (400, "extents not supported for file backend")


@pytest.mark.parametrize("tail", ["/flush", "/flush/"])
def test_flush_answers_ok(server, url, tail):
    answer = server.request("POST", url + tail)
    assert (answer.status, answer.body) == (200, b'{"ok":true}')


@pytest.mark.parametrize(
    ("method", "tail", "allow"),
    [
        pytest.param("DELETE", "", "GET, HEAD, PUT, OPTIONS", id="DELETE image"),
        pytest.param("POST", "", "GET, HEAD, PUT, OPTIONS", id="POST image"),
        pytest.param("GET", "/flush", "POST", id="GET flush"),
        pytest.param("PUT", "/extents", "GET", id="PUT extents"),
    ],
)
def test_a_method_the_resource_lacks_is_405_with_those_it_has(server, url, method, tail, allow):
    answer = server.request(method, url + tail)
    assert answer.refusal == (405, "method not allowed")
    assert set(answer.headers["Allow"].split(", ")) == set(allow.split(", "))


def test_a_read_only_image_is_405_before_the_body_is_asked_for(server, image):
    url = server.add("sealed", backend="file", file=str(image), read_only=True)
    head = f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n"
    with server.raw(head.encode()) as sock:
        answer = read_answer(sock.makefile("rb"))
    assert answer.refusal == (405, "method not allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert server.request("GET", url).body == OLD
    assert image.read_bytes() == OLD


def test_a_sparse_body_stays_sparse(server, url, image):
    body = bytearray(32 << 20)
    body[5 << 20 : (5 << 20) + 4096] = NEW[:4096]
    assert server.request("PUT", url, bytes(body)).status == 200
    assert image.read_bytes() == body
    assert image.stat().st_blocks * 512 <= 1 << 20


def test_an_empty_file_is_an_empty_image(server, url, image):
    image.write_bytes(b"")
    answer = server.request("GET", url)
    assert (answer.status, answer.body, answer.headers["Content-Length"]) == (200, b"", "0")
    answer = server.request("GET", url, headers={"Range": "bytes=-1"})
    assert answer.refusal == (416, "range not satisfiable")
    assert answer.headers["Content-Range"] == "bytes */0"


@pytest.mark.parametrize("tail", ["/flush", "/extents"])
def test_options_of_a_sub_route_is_404(server, url, tail):
    assert server.request("OPTIONS", url + tail).refusal == (404, "not found")
