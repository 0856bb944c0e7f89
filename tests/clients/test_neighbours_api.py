# SPDX-License-Identifier: Apache-2.0
"""What neighbours' clients ask for beyond the images' own (docs/api.md), to the letter."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.disks import DISK, NEW, OLD, SIZE, overwritten
from tests.system.harness import Answer, Server, nbdkit

FULL_ONLY = (400, "Range/Content-Range not supported; full writes only")


def put(server: Server, where: str, body: bytes, path: str = DISK, *fields: str) -> Answer:
    """PUT with ``Content-Range: WHERE`` and no media type."""
    length = f"Content-Length: {len(body)}"
    return server.bare("PUT", path, f"Content-Range: {where}", length, *fields, body=body)


# Content-Range


@pytest.mark.parametrize(
    ("where", "start", "length"),
    [
        ("bytes 0-0/*", 0, 1),
        ("bytes 1000-1999/*", 1000, 1000),
        (f"bytes 1000-1999/{SIZE}", 1000, 1000),
        ("bytes 1000-*/*", 1000, 5000),
        (f"bytes {SIZE - 1}-{SIZE - 1}/*", SIZE - 1, 1),
        (f"bytes 0-{SIZE - 1}/*", 0, SIZE),
    ],
)
def test_content_range_writes_there_and_nowhere_else(server, disk, where, start, length):
    answer = put(server, where, NEW[:length])
    assert (answer.status, answer.body) == (200, b'{"ok":true,"bytes_written":%d}' % length)
    assert disk.read_bytes() == overwritten(start, NEW[:length])


@pytest.mark.parametrize(
    ("where", "body"),
    [
        (f"bytes {SIZE}-{SIZE}/*", b"x"),
        (f"bytes {SIZE - 1}-{SIZE}/*", b"xx"),
        (f"bytes {SIZE - 1}-*/*", b"xx"),
        (f"bytes {2**64}-{2**64}/*", b"x"),
        (f"bytes {'9' * 500}-*/*", b"x"),
    ],
    ids=["at_the_end", "across_the_end", "star_across_the_end", "uint64", "500_digits"],
)
def test_content_range_outside_the_image_changes_nothing(server, disk, where, body):
    answer = put(server, where, body)
    assert answer.refusal == (416, "range not satisfiable")
    assert answer.headers["Content-Range"] == f"bytes */{SIZE}"
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    ("where", "body", "message"),
    [
        ("bytes 0-9", b"0123456789", "invalid Content-Range header"),
        ("bytes=0-9/*", b"0123456789", "invalid Content-Range header"),
        ("bytes */100", b"0123456789", "invalid Content-Range header"),
        ("bytes 9-0/*", b"0123456789", "invalid Content-Range header"),
        ("bytes 0-9/*", b"", "Content-Length must be positive"),
        ("bytes 0-9/*", b"0", "Content-Length (1) must equal range length (10)"),
        (f"bytes {SIZE}-*/*", b"", "Content-Length must be positive"),
        ("bytes 0-0/7", b"0", f"Content-Range size (7) must equal image size ({SIZE})"),
    ],
)
def test_a_wrong_content_range_is_refused(server, disk, where, body, message):
    assert put(server, where, body).refusal == (400, message)
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("Content-Range: bytes 0-9/*",), "Content-Length required"),
        (
            ("Content-Range: bytes 0-9/*", "Transfer-Encoding: chunked"),
            "Content-Length required",
        ),
        (("Content-Range: bytes 0-9/*", "Content-Length: 10", "Range: bytes=0-9"), FULL_ONLY[1]),
        (("Content-Range:", "Content-Length: 10"), FULL_ONLY[1]),
    ],
    ids=["no_length", "chunked", "with_range", "empty"],
)
def test_content_range_needs_a_length_and_stands_alone(server, disk, fields, message):
    answer = server.bare("PUT", DISK, *fields, "Expect: 100-continue")
    assert answer.refusal == (400, message)
    assert disk.read_bytes() == OLD


def test_a_part_that_ends_early_says_what_came(server, disk):
    answer = server.bare(
        "PUT", DISK, "Content-Range: bytes 10-19/*", "Content-Length: 10", body=b"1234"
    )
    assert answer.refusal == (400, "request body ended early at 4 bytes")
    assert disk.read_bytes() in {OLD, overwritten(10, b"1234")}


def test_a_part_is_refused_where_nothing_may_be_written(server, disk, raw_nbd):
    path = server.add("frozen", socket=str(raw_nbd), read_only=True)
    answer = put(server, "bytes 0-9/*", b"0123456789", path, "Expect: 100-continue")
    assert answer.refusal == (405, "method not allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"
    assert disk.read_bytes() == OLD


def test_a_part_of_a_read_only_export_is_refused(server, workplace):
    with nbdkit(workplace / "ro.sock", "-r", "memory", "1M") as sock:
        path = server.add("ro", socket=str(sock))
        answer = put(server, "bytes 0-9/*", b"0123456789", path)
    assert answer.refusal == (405, "method not allowed")


@pytest.mark.parametrize("where", ["bytes 0-9/*", "bytes 0-*/*", "nonsense"])
def test_a_file_is_replaced_as_a_whole_only(server, workplace, where):
    (workplace / "file").write_bytes(OLD)
    path = server.add("file", backend="file", file=str(workplace / "file"))
    assert put(server, where, b"0123456789", path).refusal == FULL_ONLY
    assert (workplace / "file").read_bytes() == OLD


# The parameter flush (B2)

#: Requests that write 10 bytes at 0: header fields, and what the image holds afterwards.
WAYS = {"part": ("Content-Range: bytes 0-9/*",), "whole": ()}


@pytest.fixture(params=["exit 0", "exit 3"], ids=["multi_conn", "no_multi_conn"])
def flushes(
    request: pytest.FixtureRequest, server: Server, workplace: Path
) -> Iterator[tuple[Path, bool]]:
    """An image of 10 bytes at /images/flushes; the file tells each write and flush.

    True: each write has to be flushed on its own connection.
    """
    told = workplace / "told"
    told.write_bytes(b"")
    scripts = (f"pwrite=cat >/dev/null; echo pwrite >>{told}", f"flush=echo flush >>{told}")
    options = ["get_size=echo 10", "pread=head -c $3 /dev/zero", "can_write=exit 0"]
    options += [f"can_multi_conn={request.param}"]
    with nbdkit(workplace / "flushes.sock", "eval", *options, "can_flush=exit 0", *scripts) as sock:
        server.add("flushes", socket=str(sock))
        yield told, request.param == "exit 3"


@pytest.mark.parametrize("fields", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize(
    ("query", "answered", "told"),
    [
        ("", b"", ["pwrite"]),
        ("?flush=n", b',"flushed":false', ["pwrite"]),
        ("?flush=y", b',"flushed":true', ["pwrite", "flush"]),
    ],
    ids=["absent", "n", "y"],
)
def test_flush_is_done_and_told_as_asked(server, flushes, fields, query, answered, told):
    length = "Content-Length: 10"
    answer = server.bare("PUT", "/images/flushes" + query, *fields, length, body=b"0123456789")
    expected = b'{"ok":true,"bytes_written":10%s}' % answered
    assert (answer.status, answer.body) == (200, expected)
    log, is_own = flushes
    assert log.read_text().split() == (["pwrite", "flush"] if is_own else told)


def test_flush_of_an_export_that_cannot_is_not_claimed(server, workplace):
    with nbdkit(
        workplace / "noflush.sock",
        "eval",
        "get_size=echo 10",
        "can_write=exit 0",
        "can_flush=exit 3",
        "pread=head -c $3 /dev/zero",
        "pwrite=cat >/dev/null",
    ) as sock:
        path = server.add("noflush", socket=str(sock))
        answer = server.request("PUT", path + "?flush=y", b"0123456789")
    assert answer.json == {"ok": True, "bytes_written": 10, "flushed": False}


@pytest.mark.parametrize("query", ["?flush=y", "?flush=n"])
def test_a_file_takes_flush_too(server, workplace, query):
    path = server.add("file", backend="file", file=str(workplace / "file"))
    answer = server.request("PUT", path + query, b"0123456789")
    flushed = query == "?flush=y"
    assert answer.json == {"ok": True, "bytes_written": 10, "flushed": flushed}


@pytest.mark.parametrize("value", ["", "Y", "yes", "true", "1", "y,n", "y&flush=y", "n&flush=y"])
def test_any_other_flush_is_refused_before_the_body(server, disk, value):
    answer = server.bare(
        "PUT", f"{DISK}?flush={value}", f"Content-Length: {SIZE}", "Expect: 100-continue"
    )
    assert answer.refusal == (400, 'invalid "flush": it must be y or n')
    assert disk.read_bytes() == OLD


# OPTIONS of the server (B3)


@pytest.mark.parametrize("writers", [1, 4])
def test_the_server_itself_says_what_it_can(workplace, writers):
    home = workplace / f"probed-{writers}"
    home.mkdir()
    with Server(home, max_writers=writers, max_readers=5, workers=2) as server:
        answers = [server.bare("OPTIONS", target) for target in ("*", "/images/*", "/images/*/")]
    for answer in answers:
        assert answer.status == 200
        assert answer.body == (
            b'{"unix_socket":null,"features":["extents","zero","flush","digest","checksum","qcow2"],'
            b'"max_readers":5,"max_writers":%d}' % writers
        )
        assert answer.fields == {
            "allow": "GET, HEAD, PUT, PATCH, POST, OPTIONS",
            "access-control-allow-methods": "GET, PUT, PATCH, POST, OPTIONS",
            "accept-ranges": "bytes",
            "cache-control": "no-store",
            "content-type": "application/json",
            "content-length": str(len(answer.body)),
        }


@pytest.mark.parametrize(
    ("method", "path", "refusal"),
    [
        ("GET", "/images/*", (404, "unknown image_id")),
        ("PUT", "/images/*", (404, "unknown image_id")),
        ("GET", "/images/*/extents", (404, "unknown image_id")),
        ("POST", "/images/*/flush", (404, "unknown image_id")),
        ("OPTIONS", "/images/*/extents", (404, "not found")),
        ("OPTIONS", "/images/", (404, "not found")),
        ("OPTIONS", "/*", (404, "not found")),
        ("GET", "/*", (404, "not found")),
        ("OPTIONS", "/", (404, "not found")),
    ],
)
def test_a_star_is_no_image_and_no_other_place(server, method, path, refusal):
    server.add("*", backend="file", file="/dev/zero")
    assert server.bare(method, path, "Content-Length: 0").refusal == refusal
