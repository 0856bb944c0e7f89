# SPDX-License-Identifier: Apache-2.0
"""Uploads with digests (RFC 9530, docs/api.md): right ones are written, wrong ones told."""

import base64
import contextlib
import hashlib
import os
import select
import signal
import socketserver
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.answers import assert_ok, assert_refused
from tests.system.clients import read_answer
from tests.system.harness import Answer, Server, exchange, program, qemu_nbd, repeatable, wait_until
from tests.system.moving import imagectl
from tests.system.threads import serving

SETTINGS = {"workers": 2}
SMALL, LONG = 70_001, 9 << 20  # hashed at once, and beside the I/O
SIZE = LONG + 512
OLD = repeatable("old").randbytes(SIZE)
NEW = repeatable("new").randbytes(SIZE)
DISK = "/images/disk"


def digest(data: bytes, algorithm: str = "sha-256", name: str = "Content-Digest") -> dict[str, str]:
    made = hashlib.new(algorithm.replace("-", ""), data).digest()
    return {name: f"{algorithm}=:{base64.b64encode(made).decode()}:"}


def assert_mismatch(answer: Answer, written: int, name: str = "Content-Digest") -> None:
    told = {"error": f"body does not match its {name}", "bytes_written": written}
    assert (answer.status, answer.json) == (400, told)


@pytest.fixture(scope="module")
def sock(workplace: Path) -> Iterator[Path]:
    (workplace / "disk.raw").write_bytes(OLD)
    with qemu_nbd(workplace / "disk.raw") as sock:
        yield sock


@pytest.fixture
def disk(server: Server, sock: Path, workplace: Path) -> Path:
    """The file of the export ``DISK``."""
    server.add("disk", socket=str(sock))
    return workplace / "disk.raw"


@pytest.fixture
def image(server: Server, home: Path) -> tuple[str, Path]:
    """An image file of its own, with the old bytes."""
    path = home / "image"
    path.write_bytes(OLD)
    return server.add("file", backend="file", file=str(path)), path


@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
def test_a_whole_export_is_verified(server, disk, algorithm):
    answer = server.request("PUT", DISK, NEW, digest(NEW, algorithm))
    assert_ok(answer, bytes_written=SIZE)
    assert disk.read_bytes() == NEW
    assert_mismatch(server.request("PUT", DISK, OLD, digest(NEW, algorithm)), SIZE)
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize("length", [SMALL, LONG])
@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_a_range_of_an_export_is_verified_and_written_as_received(server, disk, length, method):
    start = 512
    place = {"Content-Range": f"bytes {start}-{start + length - 1}/*"}
    if method == "PATCH":
        place = {"Range": f"bytes={start}-{start + length - 1}"}
    with contextlib.closing(server.connect()) as connection:
        right = exchange(connection, method, DISK, NEW[:length], place | digest(NEW[:length]))
        assert_ok(right, bytes_written=length)
        assert disk.read_bytes()[start : start + length] == NEW[:length]
        wrong = exchange(connection, method, DISK, OLD[:length], place | digest(NEW[:length]))
        assert_mismatch(wrong, length)
        assert disk.read_bytes()[start : start + length] == OLD[:length]
        # Nothing is held, and the connection goes on.
        assert exchange(connection, "POST", f"{DISK}/flush").status == 200


@pytest.mark.parametrize("length", [0, SMALL, LONG])
@pytest.mark.parametrize("name", ["Content-Digest", "Repr-Digest"])
def test_a_file_is_replaced_by_what_matches_only(server, image, length, name):
    url, path = image
    wrong = server.request("PUT", url, NEW[:length], digest(NEW, name=name))
    assert_mismatch(wrong, 0, name)
    assert path.read_bytes() == OLD
    assert os.listdir(path.parent) == [path.name]
    right = server.request("PUT", url, NEW[:length], digest(NEW[:length], name=name))
    assert_ok(right, bytes_written=length)
    assert path.read_bytes() == NEW[:length]


def test_a_body_that_ends_early_is_told_as_that(server, image):
    url, path = image
    field = ": ".join(*digest(NEW).items())
    answer = server.bare("PUT", url, field, f"Content-Length: {SIZE}", body=NEW[:LONG])
    assert_refused(answer, 400, f"request body ended early at {LONG} bytes")
    assert path.read_bytes() == OLD


def test_a_malformed_digest_is_refused_without_100_continue(server, image):
    url, path = image
    head = (
        f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n"
        "Content-Digest: sha-256=:AAAA:\r\n\r\n"
    )
    with server.raw(head.encode()) as sock, sock.makefile("rb") as stream:
        answer = read_answer(stream)
    assert (answer.status, answer.json) == (400, {"error": "invalid Content-Digest"})
    assert path.read_bytes() == OLD


def test_who_expects_100_continue_gets_it_and_is_told_of_the_mismatch(server, image):
    url, _ = image
    head = f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n"
    field = ": ".join(*digest(b"other").items())
    with server.raw(f"{head}{field}\r\n\r\n".encode()) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).status == 100
        sock.sendall(b"body")
        assert_mismatch(read_answer(stream), 0)


def test_fields_that_are_repeated_are_one_dictionary(server, image):
    url, path = image
    lines = [": ".join(*digest(b"body", a).items()) for a in ("sha-256", "sha-512")]
    answer = server.bare("PUT", url, *lines, "Content-Length: 4", body=b"body")
    assert answer.status == 200
    assert path.read_bytes() == b"body"


def test_a_worker_that_is_killed_in_a_verified_upload_leaves_the_old_file(server, image):
    url, path = image
    field = ": ".join(*digest(NEW).items())
    head = f"PUT {url} HTTP/1.1\r\nHost: x\r\nContent-Length: {SIZE}\r\nExpect: 100-continue\r\n"
    with server.raw(f"{head}{field}\r\n\r\n".encode()) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).status == 100
        sock.sendall(NEW[:LONG])
        os.kill(server.worker_of(sock), signal.SIGKILL)
        assert path.read_bytes() == OLD
    wait_until(lambda: server.request("PUT", url, NEW, digest(NEW)).status == 200)
    assert path.read_bytes() == NEW


def test_curl_uploads_with_a_digest(server, image, home):
    url, path = image
    (home / "sent").write_bytes(NEW)
    for fields, status in ((digest(NEW), "200"), (digest(OLD), "400")):
        field = ": ".join(*fields.items())
        address = f"http://127.0.0.1:{server.port}{url}"
        command = ("-sS", "-o", "/dev/null", "-w", "%{http_code}", "-H", field, "-T", home / "sent")
        done = subprocess.run(
            [program("curl"), *command, address],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert done.stdout == status
    assert path.read_bytes() == NEW


def test_a_mismatch_is_logged(server, image):
    url, _ = image
    server.request("PUT", url, b"body", digest(b"other"))
    wait_until(lambda: "error=DigestMismatch" in server.log)


# imagectl


@contextlib.contextmanager
def damaging(server: Server, marker: bytes, times: int) -> Iterator[int]:
    """Yield a port that leads to the server, and damages a marker in what is sent so many times.

    The marker is looked for in what one read returns: there must be many, to meet one whole.
    """
    left = times

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            nonlocal left
            with server.raw() as upstream:
                sockets = {self.request: upstream, upstream: self.request}
                while True:
                    for sock in select.select(list(sockets), [], [])[0]:
                        data = sock.recv(1 << 16)
                        if not data:
                            return
                        if left and sock is self.request and marker in data:
                            left -= 1
                            data = data.replace(marker, marker.swapcase(), 1)
                        sockets[sock].sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as relay, serving(relay):
        yield relay.server_address[1]


MARKED = b"marker.." * (SIZE // 8)


@pytest.fixture
def through(server: Server, disk: Path, image: tuple[str, Path], home: Path, kind: str):
    """What uploads through a port, and what the image is."""
    (home / "local").write_bytes(MARKED)
    path, there = (DISK, disk) if kind == "nbd" else image

    def upload(port: int, status: int = 0):
        url = f"http://127.0.0.1:{port}{path}"
        more = ("--verify",) if kind == "file" else ()
        return imagectl("upload", home / "local", url, "-n", 1, *more, status=status)

    return upload, there


@pytest.mark.parametrize("kind", ["nbd", "file"])
def test_imagectl_sends_again_what_has_arrived_damaged(server, through):
    upload, there = through
    with damaging(server, b"marker..", 1) as port:
        upload(port)
    assert there.read_bytes() == MARKED
    wait_until(lambda: server.log.count("error=DigestMismatch"))


@pytest.mark.parametrize("kind", ["nbd", "file"])
def test_imagectl_names_what_arrives_damaged_again(server, through, kind):
    upload, there = through
    with damaging(server, b"marker..", 1 << 30) as port:
        said = upload(port, status=4).stderr
    assert "arrived damaged, twice: " in said
    assert ("part old, part new" in said) is (kind == "nbd")
    if kind == "file":
        assert f"bytes 0-{SIZE - 1} arrived" in said
        assert there.read_bytes() == OLD
