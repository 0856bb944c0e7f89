# SPDX-License-Identifier: Apache-2.0
"""PATCH of NBD images with JSON (docs/api.md): zero, flush, and every message."""

import json
import re
from pathlib import Path

import pytest

from tests.system.answers import assert_ok, assert_refused
from tests.system.disks import CHUNK, DISK, OLD, SIZE, overwritten
from tests.system.harness import (
    Answer,
    Server,
    nbdkit,
    wait_until,
)

SETTINGS = {"chunk_size": CHUNK}
TIB = 1 << 40


def patch(server: Server, body: object, path: str = DISK, **more: str) -> Answer:
    """PATCH with a JSON body: an object, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | more
    return server.request("PATCH", path, data, headers)


def patch_raw(server: Server, *fields: str, body: bytes = b"", path: str = DISK) -> Answer:
    return server.bare("PATCH", path, *fields, body=body)


def zeroed(start: int, stop: int) -> bytes:
    return overwritten(start, bytes(stop - start))


@pytest.mark.parametrize(
    ("fields", "start", "stop"),
    [
        ({"size": 1}, 0, 1),
        ({"offset": 0, "size": SIZE}, 0, SIZE),
        ({"offset": 511, "size": 2}, 511, 513),
        ({"offset": 100, "size": 3 * CHUNK}, 100, 100 + 3 * CHUNK),
        ({"offset": CHUNK, "size": CHUNK, "flush": True}, CHUNK, 2 * CHUNK),
        ({"offset": CHUNK, "size": CHUNK, "flush": False}, CHUNK, 2 * CHUNK),
        ({"offset": SIZE - 1, "size": 2}, SIZE - 1, SIZE),
        ({"offset": 5000, "size": 100 * TIB}, 5000, SIZE),
        ({"offset": 5000, "size": 10**30}, 5000, SIZE),
        ({"size": 7, "unknown": [1]}, 0, 7),
    ],
    ids=str,
)
def test_zero_clears_those_bytes_only(
    server: Server, disk: Path, fields: dict[str, object], start: int, stop: int
):
    assert_ok(patch(server, {"op": "zero"} | fields))
    assert disk.read_bytes() == zeroed(start, stop)


@pytest.mark.parametrize(
    "media_type", ["Application/JSON", "application/json; charset=utf-8", "application/json ;a=b"]
)
def test_json_is_json_in_any_case_and_with_parameters_even_with_a_range(
    server: Server, disk: Path, media_type: str
):
    body = {"op": "zero", "size": 10}
    assert_ok(patch(server, body, **{"Content-Type": media_type, "Range": "bytes=0-1"}))
    assert disk.read_bytes() == zeroed(0, 10)


MISSING_SIZE = 'missing or invalid "size"'
UNSUPPORTED = 'unsupported op; only "zero" and "flush" are supported'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"op": "zero"}, MISSING_SIZE),
        *(({"op": "zero", "size": v}, MISSING_SIZE) for v in (None, "1", 1.0, True, [1], {})),
        (b'{"op":"zero","size":1e3}', MISSING_SIZE),
        ({"op": "zero", "size": 0}, '"size" must be positive'),
        ({"op": "zero", "size": -1}, '"size" must be positive'),
        *(
            ({"op": "zero", "size": 1, "offset": v}, 'invalid "offset"')
            for v in (None, "0", 0.0, False, [])
        ),
        ({"op": "zero", "size": 1, "offset": -1}, '"offset" must be non-negative'),
        ({"op": "zero", "size": 1, "offset": SIZE}, "offset must be less than image size"),
        ({"op": "zero", "size": 1, "offset": 10**30}, "offset must be less than image size"),
        *(
            ({"op": "zero", "size": 1, "flush": v}, 'invalid "flush"')
            for v in (None, "true", 0, 1, [])
        ),
        ([], "body must be a JSON object"),
        (b"null", "body must be a JSON object"),
        (b'"zero"', "body must be a JSON object"),
        (b"7", "body must be a JSON object"),
        ({}, UNSUPPORTED),
        *(({"op": v, "size": 1}, UNSUPPORTED) for v in ("ZERO", "trim", "", None, 1, ["zero"])),
    ],
    ids=str,
)
def test_a_wrong_json_body_is_refused(server: Server, disk: Path, body: object, message: str):
    assert_refused(patch(server, body), 400, message)
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b" ",
        b"{'op':'flush'}",
        b'{"op":"flush"} x',
        b'{"op":"flush\xff"}',
        b"[" * 60000,
        b'{"op":"zero","size":+1}',
        b'{"op":"zero","size":01}',
        b'{"op":"zero","size":1_0}',
    ],
    ids=lambda body: repr(body[:16]),
)
def test_invalid_json_is_refused(server: Server, disk: Path, body: bytes):
    answer = patch(server, body)
    assert (answer.status, answer.error[:14]) == (400, "invalid JSON: ")
    assert disk.read_bytes() == OLD


LARGEST = 64 * 1024


def padded(size: int) -> bytes:
    return b'{"op":"flush"}'.ljust(size)


@pytest.mark.parametrize(
    ("fields", "body", "message"),
    [
        (("Content-Length: 0",), b"", "Invalid Content-Length"),
        (("X: y",), b"", "Invalid Content-Length"),
        ((f"Content-Length: {LARGEST + 1}",), padded(LARGEST + 1), "Invalid Content-Length"),
        ((f"Content-Length: {10**30}",), b"", "Invalid Content-Length"),
        (("Content-Length: 1_4",), padded(14), "Invalid Content-Length"),
        (("Transfer-Encoding: chunked",), b"0\r\n\r\n", "Invalid Content-Length"),
        (("Content-Length: 15",), padded(14), "request body truncated"),
        (("Content-Length: 14",), b"", "request body truncated"),
    ],
    ids=["zero", "absent", "too_long", "huge", "not_decimal", "chunked", "cut", "cut_at_once"],
)
def test_a_json_body_of_a_wrong_length_is_refused(
    server: Server, disk: Path, fields: tuple[str, ...], body: bytes, message: str
):
    answer = patch_raw(server, "Content-Type: application/json", *fields, body=body)
    assert_refused(answer, 400, message)


def test_a_json_body_may_have_64_kib(server: Server, disk: Path):
    assert_ok(patch(server, padded(LARGEST)))


@pytest.mark.parametrize("more", [{}, {"size": "x", "offset": -1, "flush": 5}], ids=["", "other"])
def test_flush_ignores_other_members(server: Server, disk: Path, more: dict[str, object]):
    assert_ok(patch(server, {"op": "flush"} | more))
    assert disk.read_bytes() == OLD


def test_flushes_happen_when_asked_for(server: Server, workplace: Path):
    log = workplace / "flushes.log"
    options = ("--filter=log", "memory", str(SIZE), f"logfile={log}")
    with nbdkit(workplace / "flushes.sock", *options) as sock:
        path = server.add("flushes", socket=str(sock))
        for body in (
            {"op": "zero", "size": CHUNK},
            {"op": "zero", "size": CHUNK, "flush": True},
            {"op": "flush"},
        ):
            assert_ok(patch(server, body, path))
        asked = re.findall(r" (Zero|Flush) id=", log.read_text())
    assert asked == ["Zero", "Zero", "Flush", "Flush"]


def test_an_export_without_flush_refuses_flush_but_zeroes(server: Server, workplace: Path):
    options = ("eval", f"get_size=echo {SIZE}", "can_write=exit 0", "can_flush=exit 3")
    methods = ("pread=exit 1", "pwrite=exit 1", "can_zero=exit 0", "zero=exit 0")
    with nbdkit(workplace / "noflush.sock", *options, *methods) as sock:
        path = server.add("noflush", socket=str(sock))
        answer = patch(server, {"op": "flush"}, path)
        assert_refused(answer, 400, "flush not supported by this export")
        assert_ok(patch(server, {"op": "zero", "size": 512, "flush": True}, path))


def test_zero_punches_holes(server: Server, disk: Path):
    blocks, hole = disk.stat().st_blocks, 20 * CHUNK
    assert_ok(patch(server, {"op": "zero", "size": hole}))
    assert disk.stat().st_blocks == blocks - hole // 512
    assert server.request("GET", DISK + "/extents").json == [
        {"start": 0, "length": hole, "zero": True},
        {"start": hole, "length": SIZE - hole, "zero": False},
    ]


def test_100_tib_are_zeroed_by_one_request(server: Server, workplace: Path):
    stats = workplace / "stats"
    options = ("--filter=stats", "null", "100T", f"statsfile={stats}")
    with nbdkit(workplace / "null.sock", *options) as sock:
        path = server.add("null", socket=str(sock))
        assert_ok(patch(server, {"op": "zero", "offset": 0, "size": 100 * TIB}, path))
    wait_until(lambda: stats.exists() and stats.read_text())
    assert re.search(r"zero: \d+ ops, [\d.]+ s, 102400\.00 GiB", stats.read_text()), (
        stats.read_text()
    )
