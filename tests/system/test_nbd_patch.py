# SPDX-License-Identifier: Apache-2.0
"""PATCH of NBD images (docs/api.md): range writes, and every refusal."""

import contextlib
from pathlib import Path

import pytest

from tests.system.answers import assert_ok, assert_refused
from tests.system.disks import CHUNK, DISK, NEW, OLD, SIZE, overwritten
from tests.system.harness import (
    Answer,
    Server,
    exchange,
    qemu_img,
    qemu_nbd,
    repeatable,
)

SETTINGS = {"chunk_size": CHUNK}
JSON = {"Content-Type": "application/json"}


def patch_raw(server: Server, *fields: str, body: bytes = b"", path: str = DISK) -> Answer:
    return server.bare("PATCH", path, *fields, body=body)


@pytest.mark.parametrize(
    ("value", "start", "length"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=511-512", 511, 2),
        (f"bytes={CHUNK - 1}-{3 * CHUNK}", CHUNK - 1, 2 * CHUNK + 2),
        ("bytes=1000-", 1000, SIZE - 1000),
        ("bytes=-1", SIZE - 1, 1),
        (f"bytes=-{SIZE * 2}", 0, SIZE),
        (f"bytes={SIZE - 100}-{SIZE + 100}", SIZE - 100, 100),
        ("bytes=100-" + "9" * 30, 100, SIZE - 100),
        (f"bytes=0-{SIZE - 1}", 0, SIZE),
    ],
)
def test_a_range_write_changes_those_bytes_only(
    server: Server, disk: Path, value: str, start: int, length: int
):
    answer = server.request("PATCH", DISK, NEW[:length], {"Range": value})
    assert_ok(answer, bytes_written=length)
    assert disk.read_bytes() == overwritten(start, NEW[:length])


@pytest.mark.parametrize(
    "media_type",
    [None, "", "application/octet-stream", "text/plain", "application/json-patch+json", "json"],
    ids=str,
)
def test_a_range_write_takes_any_media_type_but_json(
    server: Server, disk: Path, media_type: str | None
):
    headers = {"Range": "bytes=3-5"}
    if media_type is not None:
        headers["Content-Type"] = media_type
    assert_ok(server.request("PATCH", DISK, b"xyz", headers), bytes_written=3)
    assert disk.read_bytes() == overwritten(3, b"xyz")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_random_range_writes_add_up(server: Server, tmp_path: Path, workplace: Path, fmt: str):
    image, rng, model = tmp_path / "image", repeatable(fmt), bytearray(SIZE)
    qemu_img("create", "-q", "-f", fmt, image, SIZE)
    with qemu_nbd(image, fmt=fmt, sock=workplace / "random.sock") as sock:
        path = server.add("random", socket=str(sock))
        with contextlib.closing(server.connect()) as connection:
            for _ in range(60):
                start = rng.randrange(SIZE)
                data = rng.randbytes(min(SIZE - start, rng.choice([1, 511, CHUNK, 3 * CHUNK + 1])))
                headers = {"Range": f"bytes={start}-{start + len(data) - 1}"}
                assert exchange(connection, "PATCH", path, data, headers).status == 200
                model[start : start + len(data)] = data
            assert exchange(connection, "GET", path).body == model


@pytest.mark.parametrize(
    ("value", "length", "message"),
    [
        ("bytes=0-9", 0, "Content-Length must be positive"),
        ("bytes=0-9", 9, "Content-Length (9) must equal range length (10)"),
        ("bytes=0-9", 11, "Content-Length (11) must equal range length (10)"),
        ("bytes=-10", 11, "Content-Length (11) must equal range length (10)"),
        (f"bytes={SIZE - 5}-{SIZE + 4}", 10, "Content-Length (10) must equal range length (5)"),
        ("bytes=5-", 10**25, f"Content-Length ({10**25}) must equal range length ({SIZE - 5})"),
        ("bytes=0-1,3-4", 4, "invalid Range header"),
        ("bytes=-0", 1, "invalid Range header"),
        ("sectors=0-1", 2, "invalid Range header"),
    ],
)
def test_a_range_write_of_another_length_is_refused_before_its_body(
    server: Server, disk: Path, value: str, length: int, message: str
):
    fields = (f"Range: {value}", f"Content-Length: {length}", "Expect: 100-continue")
    assert_refused(patch_raw(server, *fields), 400, message)
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    "value", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 2}", "bytes=5-3", "bytes=" + "9" * 30 + "-"]
)
def test_a_range_write_outside_the_image_is_answered_with_416(
    server: Server, disk: Path, value: str
):
    fields = (f"Range: {value}", "Content-Length: 3", "Expect: 100-continue")
    answer = patch_raw(server, *fields)
    assert_refused(answer, 416, "range not satisfiable", **{"content-range": f"bytes */{SIZE}"})
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("X: y", "Content-Length required"),
        ("Transfer-Encoding: chunked", "Content-Length required"),
        ("Content-Length: 1_0", "Invalid Content-Length"),
        ("Content-Length: +1", "Invalid Content-Length"),
    ],
)
def test_a_range_write_needs_a_length(server: Server, disk: Path, field: str, message: str):
    assert_refused(patch_raw(server, "Range: bytes=0-9", field), 400, message)
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize("sent", [0, 1, CHUNK + 7])
def test_a_range_write_that_ends_early_says_where(server: Server, disk: Path, sent: int):
    fields = ("Range: bytes=1-8192", "Content-Length: 8192")
    answer = patch_raw(server, *fields, body=NEW[:sent])
    assert_refused(answer, 400, f"request body ended early at {sent} bytes")
    assert server.request("PATCH", DISK, b"x", {"Range": "bytes=0-0"}).status == 200


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/octet-stream"], ids=str)
def test_neither_range_nor_json_is_an_unsupported_media_type(
    server: Server, disk: Path, media_type: str | None
):
    headers = {"Content-Type": media_type} if media_type else {}
    answer = server.request("PATCH", DISK, b'{"op":"zero","size":10}', headers)
    message = (
        "PATCH requires Content-Type: application/json (for zero/flush) or Range with binary body"
    )
    assert_refused(answer, 415, message)
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize("how", ["transfer", "export"])
@pytest.mark.parametrize("body", ["zero", "binary"])
def test_a_read_only_image_refuses_patch(
    server: Server, raw_nbd: Path, disk: Path, workplace: Path, how: str, body: str
):
    with contextlib.ExitStack() as stack:
        if how == "transfer":
            path = server.add("ro", socket=str(raw_nbd), read_only=True)
        else:
            sock = stack.enter_context(qemu_nbd(disk, "-r", sock=workplace / "ro.sock"))
            path = server.add("ro", socket=str(sock))
        if body == "zero":
            answer = server.request("PATCH", path, b'{"op":"zero","size":10}', JSON)
        else:
            fields = ("Range: bytes=0-9", "Content-Length: 10", "Expect: 100-continue")
            answer = patch_raw(server, *fields, path=path)
        assert_refused(answer, 405, answer.error, allow="GET, HEAD, OPTIONS")
    assert disk.read_bytes() == OLD
