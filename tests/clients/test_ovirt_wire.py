# SPDX-License-Identifier: Apache-2.0
"""What oVirt's engine and clients ask of its daemon: close, flush by default, CORS, sparse."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ovirt_imageio.client import ImageioClient

from tests.system.harness import Answer, Server, exchange, nbdkit, qemu_nbd

MIB = 1 << 20
SIZE = 4 * MIB
ENGINE = "https://engine.example"


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    settings = {"cors_origins": f"{ENGINE},https://other.example", "put_flush": "y"}
    with Server(workplace, max_writers=4, **settings) as running:
        yield running


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize(("sparse", "left"), [({}, 0), ({"sparse": False}, SIZE)], ids=str)
def test_a_preallocated_image_stays_so_where_its_transfer_says_it(server, workplace, sparse, left):
    disk = workplace / f"zeroed-{left}"
    disk.write_bytes(b"x" * SIZE)
    with qemu_nbd(disk, "--discard=unmap") as sock:
        path = server.add(disk.name, socket=str(sock), **sparse)
        with ImageioClient(f"http://localhost:{server.port}{path}") as client:
            client.zero(0, SIZE)
            client.flush()
    assert disk.read_bytes() == bytes(SIZE)
    assert allocated(disk) == left


def test_a_put_that_does_not_say_whether_is_flushed(server, workplace):
    log = workplace / "flushes"
    plugin = (
        "get_size=echo 4096",
        "pwrite=cat >/dev/null",
        "pread=head -c $3 /dev/zero",
        "can_write=exit 0",
        "can_flush=exit 0",
        "can_multi_conn=exit 0",
        f"flush=echo >> {log}",
    )
    with nbdkit(workplace / "plugin.sock", "eval", *plugin):
        path = server.add("plugin", socket=str(workplace / "plugin.sock"))
        part = {"Content-Range": "bytes 0-511/*"}
        for query, headers, body in (
            ("", {}, bytes(4096)),
            ("", part, bytes(512)),
            ("?flush=n", part, bytes(512)),
        ):
            answer = server.request("PUT", path + query, body, headers)
            assert (answer.status, answer.json.get("flushed")) == (200, False if query else None)
    assert log.read_text() == "\n\n"


@pytest.mark.parametrize(("method", "body"), [("GET", None), ("PUT", b"the same")])
def test_a_client_that_is_done_says_so(server, workplace, method, body):
    (workplace / "file").write_bytes(b"the same")
    path = server.add("file", backend="file", file=str(workplace / "file"))
    with closing(server.connect()) as connection:
        kept = exchange(connection, method, f"{path}?close=n", body)
        assert (kept.status, kept.headers["Connection"]) == (200, "keep-alive")
        closed = exchange(connection, method, f"{path}?close=y", body)
        assert (closed.status, closed.headers["Connection"]) == (200, "close")
        assert connection.sock is None
    with server.raw(f"GET {path}?close=y HTTP/1.1\r\nHost: x\r\n\r\n".encode()) as sock:
        received = b""
        while data := sock.recv(65536):  # until the server closes
            received += data
    assert received.endswith(b"\r\n\r\nthe same")


def preflight(server: Server, path: str, origin: str) -> Answer:
    """Ask as Firefox does before it uploads a part."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "cache-control,content-range,content-type",
    }
    return server.request("OPTIONS", path, headers=headers)


def test_a_browser_may_upload_and_download_from_the_engines_site(server, workplace):
    (workplace / "file").write_bytes(b"the same")
    path = server.add("file", backend="file", file=str(workplace / "file"))
    guarded = server.add("guarded", backend="file", file=str(workplace / "file"), token="t")  # noqa: S106

    asked = preflight(server, path, ENGINE)
    assert (asked.status, asked.headers["Access-Control-Allow-Origin"]) == (200, ENGINE)
    assert asked.headers["Access-Control-Allow-Headers"] == "*, Authorization"
    assert "PUT" in asked.headers["Access-Control-Allow-Methods"]
    with closing(server.connect()) as connection:
        headers = {"Origin": ENGINE, "Access-Control-Request-Method": "GET"}
        empty = exchange(connection, "OPTIONS", guarded, headers=headers)
        assert (empty.status, empty.body, empty.headers["Content-Length"]) == (204, b"", None)
        answer = exchange(connection, "GET", path, headers={"Origin": ENGINE})
    assert answer.headers["Access-Control-Allow-Origin"] == ENGINE
    assert (answer.headers["Vary"], answer.body) == ("Origin", b"the same")
    refused = server.request("GET", guarded, headers={"Origin": ENGINE})
    assert (refused.status, refused.headers["Access-Control-Allow-Origin"]) == (401, ENGINE)
    assert (
        preflight(server, path, "https://evil.example").headers.get_all(
            "Access-Control-Allow-Origin"
        )
        is None
    )
    assert preflight(server, guarded, "https://evil.example").status == 401
