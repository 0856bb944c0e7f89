# SPDX-License-Identifier: Apache-2.0
"""Raw files as disks, without an NBD server (docs/api.md): what no test of NBD images shows."""

import contextlib
import hashlib
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.system.answers import UNKNOWN, assert_ok
from tests.system.clients import putting, read_answer, reading
from tests.system.disks import BIG, sparse
from tests.system.harness import Server, repeatable, wait_until

SETTINGS = {"max_writers": 4}
K, M = 1 << 10, 1 << 20
DATA = repeatable("raw").randbytes(M)
NO_ACCESS = (500, "failed to access file")


@pytest.fixture
def image(workplace: Path) -> Path:
    """Make a disk of 64 MiB with 1 MiB of data at 5 MiB."""
    image = sparse(workplace / "image.raw", BIG)
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), DATA, 5 * M)
    return image


@pytest.fixture
def url(server: Server, image: Path) -> str:
    return server.add("raw", backend="file", file=str(image), format="raw")


def largest(path: Path) -> int:
    """Make a sparse file of 16 TiB, or of what the file system has; return its size."""
    with path.open("wb") as file:
        for size in (1 << 40, 8 << 40, (16 << 40) - 4096):  # the most that ext4 has
            with contextlib.suppress(OSError):
                file.truncate(size)
    return path.stat().st_size


def drain(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def patching(offset: int, length: int) -> str:
    return f"Range: bytes={offset}-{offset + length - 1}"


@pytest.mark.parametrize("read_only", [False, True])
def test_options_and_head_say_what_they_say_of_an_nbd_image(
    server: Server, image: Path, read_only: bool
):
    url = server.add("x", backend="file", file=str(image), format="raw", read_only=read_only)
    answer = server.request("OPTIONS", url)
    features = ["extents", "zero", "flush", "digest", "checksum", "qcow2"]
    assert answer.json == {
        "unix_socket": None,
        "features": ["extents", "checksum", "qcow2"] if read_only else features,
        "max_readers": 8,
        "max_writers": 0 if read_only else 4,
    }
    assert answer.headers["Allow"] == f"GET, HEAD, {'' if read_only else 'PUT, PATCH, '}OPTIONS"
    assert server.request("HEAD", url).headers["Content-Length"] == str(BIG)
    written = server.request("PATCH", url, b"x", {"Range": "bytes=0-0"})
    assert written.status == (405 if read_only else 200)


def test_holes_are_zero_extents_and_what_is_zeroed_becomes_one(
    server: Server, image: Path, url: str
):
    assert server.request("GET", f"{url}/extents").json == [
        {"start": 0, "length": 5 * M, "zero": True},
        {"start": 5 * M, "length": M, "zero": False},
        {"start": 6 * M, "length": BIG - 6 * M, "zero": True},
    ]
    zero = b'{"op":"zero","offset":%d,"size":%d,"flush":true}' % (5 * M + 1, 512 * K)
    assert_ok(server.request("PATCH", url, zero, {"Content-Type": "application/json"}))
    assert server.request("GET", f"{url}/extents?context=dirty&start={4 * M}").json == [
        {"start": 4 * M, "length": M, "dirty": True, "zero": True},
        {"start": 5 * M, "length": 4 * K, "dirty": True, "zero": False},
        {"start": 5 * M + 4 * K, "length": 508 * K, "dirty": True, "zero": True},
        {"start": 5 * M + 512 * K, "length": 512 * K, "dirty": True, "zero": False},
        {"start": 6 * M, "length": BIG - 6 * M, "dirty": True, "zero": True},
    ]
    expected = DATA[:1] + bytes(512 * K) + DATA[512 * K + 1 :]
    assert image.read_bytes() == bytes(5 * M) + expected + bytes(BIG - 6 * M)
    os.sync()
    assert image.stat().st_blocks * 512 < M


def test_a_checksum_is_that_of_the_file(server: Server, image: Path, url: str):
    answer = server.request("GET", f"{url}/checksum?algorithm=whole-sha256")
    assert answer.json["checksum"] == hashlib.sha256(image.read_bytes()).hexdigest()


def test_what_can_be_told_of_16_tib_is_told_in_seconds(server: Server, home: Path):
    image = home / "huge"
    size = largest(image)
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), DATA, size // 2)
    url = server.add("huge", backend="file", file=str(image), format="raw")
    in_seconds = 10
    answer = server.request("GET", f"{url}/extents", timeout=in_seconds)
    assert [extent["zero"] for extent in answer.json] == [True, False, True]
    answer = server.request("GET", f"{url}/checksum?block_size={16 * M}", timeout=in_seconds)
    assert answer.json["block_size"] == 16 * M
    answer = server.request("GET", f"{url}?format=qcow2", timeout=in_seconds)
    assert M < len(answer.body) < 4 * M
    zero, json = b'{"op":"zero","size":%d}' % size, {"Content-Type": "application/json"}
    assert_ok(server.request("PATCH", url, zero, json, timeout=in_seconds))
    whole = [{"start": 0, "length": size, "zero": True}]
    assert server.request("GET", f"{url}/extents", timeout=in_seconds).json == whole
    assert image.stat().st_size == size


def test_another_format_makes_the_id_unknown_and_the_log_says_why(server: Server, image: Path):
    url = server.add("strange", backend="file", file=str(image), format="qcow2")
    assert server.request("GET", url).refusal == UNKNOWN
    line = wait_until(lambda: next((x for x in server.log.splitlines() if "strange" in x), None))
    assert '"format" must be "raw" or "opaque"' in line.replace("\\", "")


def test_a_file_that_lacks_is_not_made(server: Server, workplace: Path):
    missing = workplace / "missing"
    url = server.add("missing", backend="file", file=str(missing), format="raw")
    assert server.request("OPTIONS", url).json["max_writers"] == 4
    for method, tail, body in (
        ("GET", "", None),
        ("PUT", "", b"x"),
        ("GET", "/extents", None),
        ("GET", "/checksum", None),
        ("POST", "/flush", None),
    ):
        assert server.request(method, url + tail, body).refusal == NO_ACCESS
    assert not missing.exists()
    assert server.holders() == []


def test_writers_of_ranges_share_the_file_and_nobody_who_wants_it_alone(
    server: Server, image: Path, url: str
):
    """The same file without ``format``, under another name, is the same image."""
    link = image.with_name("link")
    link.symlink_to(image)
    opaque = server.add("opaque", backend="file", file=str(link))

    def write(offset: int) -> int:
        headers = {"Range": f"bytes={offset}-{offset + 64 * K - 1}"}
        return server.request("PATCH", url, DATA[: 64 * K], headers).status

    head = f"PATCH {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n{patching(0, 2)}\r\n"
    with server.raw(f"{head}Expect: 100-continue\r\n\r\n".encode()) as sock:
        stream = sock.makefile("rb")
        assert read_answer(stream).status == 100
        with ThreadPoolExecutor(3) as pool:
            assert set(pool.map(write, range(M, 3 * M, 64 * K))) == {200}
        assert server.request("PUT", opaque, b"x").refusal == (409, "image busy")
        assert server.request("PUT", url, bytes(BIG)).refusal == (409, "image busy")
        assert server.request("GET", f"{url}/extents").refusal == (409, "image busy")
        sock.sendall(b"ab")
        assert read_answer(stream).status == 200
    assert image.read_bytes()[: 3 * M] == b"ab" + bytes(M - 2) + DATA[: 64 * K] * 32
    with putting(server, opaque, 10, b"x"):
        assert write(0) == 409
    link.unlink()


@pytest.mark.parametrize("way", ["range", "whole"])
def test_a_worker_that_dies_in_a_write_leaves_the_file_to_the_next(
    server: Server, image: Path, url: str, way: str
):
    length = 8 * M if way == "range" else BIG
    where = f"Content-Range: bytes 0-{length - 1}/*\r\n" if way == "range" else ""
    head = f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{where}\r\n"
    with server.raw(head.encode() + DATA * 4) as sock:
        wait_until(lambda: image.read_bytes()[: 3 * M] == DATA * 3)
        assert server.request("GET", f"{url}/extents").refusal == (409, "image busy")
        os.kill(server.worker_of(sock), signal.SIGKILL)
        wait_until(lambda: server.request("GET", f"{url}/extents").status == 200)
    assert server.request("PUT", url, b"y" * BIG).status == 200
    assert server.holders() == []
    assert image.stat().st_size == BIG


def test_a_file_that_is_cut_short_cuts_its_readers_and_stays_short(
    server: Server, image: Path, url: str
):
    with reading(server, url) as sock:
        os.truncate(image, 6 * M)
        with pytest.raises(ConnectionResetError):
            drain(sock)
    with putting(server, url, 6 * M, DATA) as (sock, stream):
        os.truncate(image, M)
        sock.sendall(DATA * 5)
        assert read_answer(stream).refusal == NO_ACCESS
    assert image.stat().st_size == M
    assert server.holders() == []


@pytest.mark.parametrize("way", ["removed", "replaced"])
def test_a_file_that_loses_its_name_cuts_its_readers_and_fails_its_writers(
    server: Server, image: Path, url: str, way: str
):
    """What they write is nowhere: 200 would be a lie."""
    size = 16 * M
    os.truncate(image, size)
    new = sparse(image.with_name("new.raw"), size)
    with reading(server, url) as sock, putting(server, url, size, DATA) as (put, stream):
        if way == "removed":
            image.unlink()
        else:
            new.replace(image)
        with pytest.raises(ConnectionResetError):
            drain(sock)
        put.sendall(DATA * 15)
        assert read_answer(stream).refusal == NO_ACCESS
    assert image.exists() is (way == "replaced")
    assert not image.exists() or image.read_bytes() == bytes(size)
    assert server.holders() == []
