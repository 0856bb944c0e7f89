# SPDX-License-Identifier: Apache-2.0
"""GET and HEAD of NBD images (docs/api.md): the right bytes, headers and refusals."""

import contextlib
import http.client
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.system.harness import (
    Answer,
    Server,
    exchange,
    nbdkit,
    qemu_img,
    qemu_nbd,
    repeatable,
    wait_until,
)

#: The smallest that the server takes, so that small images span many pieces.
CHUNK = 4096
SETTINGS = {"chunk_size": CHUNK, "backend_timeout": 1}
COMMON = {
    "accept-ranges": "bytes",
    "access-control-allow-methods": "GET, PUT, OPTIONS",
    "cache-control": "no-store",
}
IMAGE_DATA = COMMON | {"content-type": "application/octet-stream"}


@dataclass
class Image:
    """A served image, and what it holds."""

    path: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)


@pytest.fixture(scope="module")
def images(server: Server, workplace: Path) -> Iterator[dict[str, Image]]:
    """The same kind of random bytes: raw, qcow2, of an odd size, and none at all.

    The last two also as files that the server serves itself.
    """
    data = repeatable("image").randbytes(40 * CHUNK + 512)
    raw, qcow2 = workplace / "a.raw", workplace / "a.qcow2"
    odd, empty = workplace / "odd", workplace / "empty"
    raw.write_bytes(data)
    odd.write_bytes(data[:-511])
    empty.touch()
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=512", raw, qcow2)
    with contextlib.ExitStack() as stack:
        sockets = {
            "raw": stack.enter_context(qemu_nbd(raw)),
            "qcow2": stack.enter_context(qemu_nbd(qcow2, fmt="qcow2", export="vda")),
            "odd": stack.enter_context(nbdkit(workplace / "odd.sock", "file", str(odd))),
            "empty": stack.enter_context(nbdkit(workplace / "empty.sock", "file", str(empty))),
        }
        for name, path in sockets.items():
            server.add(name, socket=str(path), export="vda" if name == "qcow2" else "")
        for path in (odd, empty):
            server.add(f"{path.name}-file", backend="file", file=str(path), format="raw")
        yield {
            "odd file": Image("/images/odd-file", data[:-511]),
            "empty file": Image("/images/empty-file", b""),
            "raw": Image("/images/raw", data),
            "qcow2": Image("/images/qcow2", data),
            "odd": Image("/images/odd", data[:-511]),
            "empty": Image("/images/empty", b""),
        }


def fields_of(answer: Answer, name: str) -> dict[str, str]:
    """Return an answer's fields; of a file without validators, which it has 2 s after a change.

    ``test_conditions`` is about those.
    """
    fields = dict(answer.fields)
    if name.endswith(" file") and fields.pop("etag", None):
        assert fields.pop("last-modified")
        assert fields["cache-control"] == "no-cache"
        fields["cache-control"] = "no-store"
    return fields


ALL = pytest.mark.parametrize("name", ["raw", "qcow2", "odd", "empty", "odd file", "empty file"])


def get(server: Server, path: str, **headers: str) -> Answer:
    return server.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})


@ALL
def test_get_sends_the_whole_image(server: Server, images: dict[str, Image], name: str):
    image = images[name]
    answer = get(server, image.path)
    assert (answer.status, answer.body) == (200, image.data)
    assert fields_of(answer, name) == IMAGE_DATA | {"content-length": str(image.size)}


def test_a_trailing_slash_is_tolerated(server: Server, images: dict[str, Image]):
    answer = get(server, images["raw"].path + "/")
    assert (answer.status, answer.body) == (200, images["raw"].data)


SIZE = 40 * CHUNK + 512


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-4095", 0, 4096),
        ("bytes=1-4096", 1, 4097),
        ("bytes=4095-4096", 4095, 4097),
        ("bytes=5000-", 5000, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        (f"bytes=0-{SIZE - 1}", 0, SIZE),
        (f"bytes=100-{SIZE}", 100, SIZE),
        ("bytes=7-" + "9" * 40, 7, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-5000", SIZE - 5000, SIZE),
        (f"bytes=-{SIZE}", 0, SIZE),
        ("bytes=-" + "9" * 40, 0, SIZE),
        ("BYTES=2-3", 2, 4),
        (" bytes=2-3\t", 2, 4),
        ("bytes=0002-0003", 2, 4),
    ],
)
def test_a_range_is_answered_with_206(
    server: Server, images: dict[str, Image], value: str, start: int, stop: int
):
    answer = get(server, images["raw"].path, Range=value)
    assert (answer.status, answer.body) == (206, images["raw"].data[start:stop])
    assert answer.fields == IMAGE_DATA | {
        "content-length": str(stop - start),
        "content-range": f"bytes {start}-{stop - 1}/{SIZE}",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("raw", f"bytes={SIZE}-"),
        ("raw", f"bytes={SIZE}-{SIZE + 5}"),
        ("raw", "bytes=5-4"),
        ("raw", "bytes=" + "9" * 40 + "-"),
        ("empty", "bytes=0-"),
        ("empty", "bytes=0-0"),
        ("empty", "bytes=-1"),
    ],
)
def test_a_range_without_a_byte_of_the_image_is_answered_with_416(
    server: Server, images: dict[str, Image], name: str, value: str
):
    image = images[name]
    answer = get(server, image.path, Range=value)
    assert (answer.status, answer.json) == (416, {"error": "range not satisfiable"})
    assert answer.fields == COMMON | {
        "content-type": "application/json",
        "content-length": str(len(answer.body)),
        "content-range": f"bytes */{image.size}",
    }


@pytest.mark.parametrize("name", ["raw", "empty", "odd file", "empty file"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=-0",
        "bytes=-00",
        "bytes=0-1,3-4",
        "bytes=0-1,",
        "bytes=0 - 1",
        "bytes= 0-1",
        "bytes =0-1",
        "bytes=+0-1",
        "bytes=1_0-20",
        "bytes=0x0-1",
        "bytes=1.0-2",
        "bytes=--1",
        "bytes=0-1-2",
        "bytes=a-b",
        "sectors=0-1",
        "0-1",
        "bytes:0-1",
    ],
)
def test_a_bad_range_is_refused(server: Server, images: dict[str, Image], name: str, value: str):
    answer = get(server, images[name].path, Range=value)
    assert (answer.status, answer.json) == (400, {"error": "invalid Range header"})
    assert answer.fields == COMMON | {
        "content-type": "application/json",
        "content-length": str(len(answer.body)),
    }


@pytest.mark.parametrize("value", ["bytes=0-9", "bytes=5-4", "nonsense"])
def test_if_range_never_matches(server: Server, images: dict[str, Image], value: str):
    answer = get(server, images["raw"].path, Range=value, If_Range='"an-etag"')
    assert (answer.status, answer.body) == (200, images["raw"].data)
    assert "content-range" not in answer.fields


@ALL
@pytest.mark.parametrize("value", [None, "bytes=1-2", "bytes=-0"], ids=str)
def test_head_sends_the_headers_of_the_whole_image(
    server: Server, images: dict[str, Image], name: str, value: str | None
):
    image = images[name]
    answer = server.request("HEAD", image.path, headers={"Range": value} if value else {})
    assert (answer.status, answer.body) == (200, b"")
    assert fields_of(answer, name) == IMAGE_DATA | {"content-length": str(image.size)}


@pytest.mark.parametrize("name", ["raw", "qcow2", "odd", "odd file"])
def test_any_range_is_the_slice_of_the_image(server: Server, images: dict[str, Image], name: str):
    image, rng = images[name], repeatable(name)
    edges = [n * CHUNK + d for n in (0, 1, 2, 5, 40) for d in (-1, 0, 1)]
    with contextlib.closing(server.connect()) as connection:
        for _ in range(150):
            start = rng.choice([rng.choice(edges), rng.randrange(image.size)]) % image.size
            length = max(1, rng.choice([rng.choice(edges), rng.randrange(image.size)]))
            value = f"bytes={start}-{start + length - 1}"
            answer = exchange(connection, "GET", image.path, headers={"Range": value})
            expected = image.data[start : start + length]
            assert (answer.status, answer.body == expected) == (206, True), value
            assert fields_of(answer, name) == IMAGE_DATA | {
                "content-length": str(len(expected)),
                "content-range": f"bytes {start}-{start + len(expected) - 1}/{image.size}",
            }


def test_an_http_1_0_client_gets_the_image_and_the_end_of_the_connection(
    server: Server, images: dict[str, Image]
):
    with server.raw(b"GET /images/raw HTTP/1.0\r\nRange: bytes=0-9999\r\n\r\n") as sock:
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert (response.status, response.read()) == (206, images["raw"].data[:10000])
        assert sock.recv(1) == b""


# What cannot be served


@pytest.fixture(scope="module")
def listening(workplace: Path) -> Iterator[socket.socket]:
    """A server that says nothing."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(workplace / "silent.sock"))
        sock.listen(64)
        yield sock


@pytest.mark.parametrize(
    ("method", "target"),
    [("GET", ""), ("HEAD", ""), ("GET", "/extents"), ("POST", "/flush")],
    ids=["GET", "HEAD", "extents", "flush"],
)
@pytest.mark.parametrize("kind", ["missing", "not_a_socket", "nobody_listens", "no_such_export"])
def test_an_unreachable_back_end_is_an_error(
    server: Server, images: dict[str, Image], workplace: Path, kind: str, method: str, target: str
):
    path = workplace / kind
    export = ""
    if kind == "not_a_socket":
        path.touch()
    elif kind == "nobody_listens" and not path.exists():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif kind == "no_such_export":
        path, export = workplace / "a.qcow2.sock", "vdb"
    image = server.add(kind, socket=str(path), export=export)
    answer = server.request(method, image + target)
    body = b"" if method == "HEAD" else b'{"error":"backend error"}'
    assert (answer.status, answer.body) == (500, body)
    assert answer.fields == COMMON | {"content-type": "application/json", "content-length": "25"}
    op = {"/extents": "extents", "/flush": "flush"}.get(
        target, "head" if method == "HEAD" else "read"
    )
    told = f"transfer={kind} op={op} "
    lines = wait_until(lambda: [line for line in server.log.splitlines() if told in line])
    assert "[WARNING]" in lines[-1]
    assert " status=500 " in lines[-1]
    assert " error=BackendError " in lines[-1]


def test_a_back_end_that_falls_silent_after_the_handshake_times_out(
    server: Server, workplace: Path
):
    options = ("--filter=delay", "memory", "1M", "delay-read=10", "delay-extents=10")
    with nbdkit(workplace / "slow.sock", *options) as sock:
        image = server.add("slow", socket=str(sock))
        for target in ("", "/extents"):
            answer = server.request("GET", image + target)
            assert (answer.status, answer.json) == (504, {"error": "backend timeout"})


def test_a_back_end_silent_in_the_handshake_times_out_after_10_seconds(
    server: Server, listening: socket.socket
):
    image = server.add("silent", socket=listening.getsockname())
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(server.request, "GET", image + end) for end in ("", "/extents")]
        for answer in (future.result() for future in asked):
            assert (answer.status, answer.json) == (504, {"error": "backend timeout"})
    for _ in asked:
        with listening.accept()[0] as left:
            left.settimeout(5)
            assert left.recv(1) == b"", "the connection is still there"


def test_head_waits_no_longer_than_options_does(server: Server, listening: socket.socket):
    image = server.add("quiet", socket=listening.getsockname())
    with contextlib.closing(server.connect(timeout=3)) as connection:
        assert exchange(connection, "HEAD", image).status == 504
