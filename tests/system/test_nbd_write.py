# SPDX-License-Identifier: Apache-2.0
"""PUT of whole NBD images and POST flush (docs/api.md): the right bytes, and every refusal."""

import contextlib
import http.client
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.answers import assert_ok, assert_only_common_fields, assert_refused
from tests.system.disks import CHUNK, DISK, NEW, OLD, SIZE
from tests.system.harness import (
    Answer,
    Server,
    exchange,
    nbdkit,
    qemu_img,
    qemu_nbd,
)

SETTINGS = {"chunk_size": CHUNK}


def put(server: Server, *fields: str, body: bytes = b"", path: str = DISK) -> Answer:
    return server.bare("PUT", path, *fields, body=body)


# Whole images


def test_put_replaces_every_byte(server: Server, disk: Path):
    answer = server.request("PUT", DISK, NEW)
    assert_ok(answer, bytes_written=SIZE)
    assert disk.read_bytes() == NEW


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("size", [512, CHUNK - 512, CHUNK, CHUNK + 512, 5 * CHUNK, 9 * CHUNK + 512])
def test_put_and_get_agree_at_every_chunk_boundary(
    server: Server, tmp_path: Path, workplace: Path, fmt: str, size: int
):
    image = tmp_path / "image"
    qemu_img("create", "-q", "-f", fmt, image, size)
    with qemu_nbd(image, fmt=fmt, sock=workplace / "boundary.sock") as sock:
        path = server.add("boundary", socket=str(sock))
        with contextlib.closing(server.connect()) as connection:
            written = exchange(connection, "PUT", path, NEW[:size])
            assert (written.status, written.json["bytes_written"]) == (200, size)
            assert exchange(connection, "GET", path).body == NEW[:size]


def test_put_of_an_empty_image_takes_an_empty_body(server: Server, workplace: Path):
    with nbdkit(workplace / "empty.sock", "memory", "0") as sock:
        path = server.add("empty", socket=str(sock))
        answer = server.request("PUT", path, b"")
        assert (answer.status, answer.json) == (200, {"ok": True, "bytes_written": 0})


def test_put_takes_a_body_that_trickles_in(server: Server, disk: Path):
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("PUT", DISK)
        connection.putheader("Content-Length", str(SIZE))
        connection.endheaders()
        for at in range(0, SIZE, 1111):
            connection.send(NEW[at : at + 1111])
        assert connection.getresponse().status == 200
    assert disk.read_bytes() == NEW


def test_put_of_any_media_type_is_taken(server: Server, disk: Path):
    headers = {"Content-Type": "application/json"}
    assert server.request("PUT", DISK, NEW, headers).status == 200
    assert disk.read_bytes() == NEW


# Refusals, each before a byte is written


@pytest.mark.parametrize("length", [0, 1, SIZE - 512, SIZE - 1, SIZE + 1, 10 * SIZE, 10**30])
def test_put_of_another_size_is_refused_naming_both(server: Server, disk: Path, length: int):
    answer = put(server, f"Content-Length: {length}", "Expect: 100-continue")
    assert answer.status == 400
    assert str(length) in answer.error
    assert str(SIZE) in answer.error
    assert_only_common_fields(answer)
    assert disk.read_bytes() == OLD


def test_put_of_another_size_is_refused_though_the_body_is_there(server: Server, disk: Path):
    answer = put(server, f"Content-Length: {SIZE - 512}", body=NEW[:-512])
    assert answer.status == 400
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    "field",
    [
        "X: y",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nExpect: 100-continue",
    ],
    ids=["absent", "chunked", "chunked_expecting_100"],
)
def test_put_needs_a_content_length(server: Server, disk: Path, field: str):
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (SIZE, NEW) if "chunked" in field else b""
    answer = put(server, field, body=body)
    assert_refused(answer, 400, "Content-Length required")
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    "value",
    ["+5", "-1", "1_0", "0x10", "1.0", "1e3", "5,5", "5, 6", "5 5", "five", "\uff15", '"5"'],
)
def test_put_needs_a_plain_decimal_length(server: Server, disk: Path, value: str):
    answer = put(server, f"Content-Length: {value}")
    assert_refused(answer, 400, "Invalid Content-Length")
    assert disk.read_bytes() == OLD


def test_put_takes_no_two_lengths(server: Server, disk: Path):
    lengths = (f"Content-Length: {SIZE}", f"Content-Length: {SIZE - 1}")
    assert put(server, *lengths, body=NEW).status == 400
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize(
    "field",
    [f"Range: bytes=0-{SIZE - 1}", "Range: nonsense"],
)
@pytest.mark.parametrize("length", [f"Content-Length: {SIZE}", "Content-Length: 0", "X: y"])
def test_put_of_a_range_is_refused(server: Server, disk: Path, field: str, length: str):
    answer = put(server, field, length, "Expect: 100-continue")
    assert_refused(answer, 400, "Range/Content-Range not supported; full writes only")
    assert disk.read_bytes() == OLD


@pytest.mark.parametrize("sent", [0, 1, CHUNK, CHUNK + 100, SIZE - 1])
def test_a_body_that_ends_early_is_answered_and_frees_the_image(
    server: Server, disk: Path, sent: int
):
    answer = put(server, f"Content-Length: {SIZE}", body=NEW[:sent])
    assert_refused(answer, 400, f"request body ended early at {sent} bytes")
    assert server.request("PUT", DISK, NEW).status == 200
    assert disk.read_bytes() == NEW


@pytest.mark.parametrize("how", ["transfer", "export"])
@pytest.mark.parametrize("length", [SIZE, 5])
def test_a_read_only_image_refuses_put_before_the_body(
    server: Server, raw_nbd: Path, disk: Path, workplace: Path, how: str, length: int
):
    with contextlib.ExitStack() as stack:
        if how == "transfer":
            path = server.add("ro", socket=str(raw_nbd), read_only=True)
        else:
            sock = stack.enter_context(qemu_nbd(disk, "-r", sock=workplace / "ro.sock"))
            path = server.add("ro", socket=str(sock))
        fields = (f"Content-Length: {length}", "Expect: 100-continue")
        answer = put(server, *fields, path=path)
        assert_refused(answer, 405, answer.error, allow="GET, HEAD, OPTIONS")
        assert server.request("GET", path).body == OLD


def test_100_continue_is_sent_when_the_body_is_wanted(server: Server, disk: Path):
    head = f"PUT /images/disk HTTP/1.1\r\nHost: x\r\nContent-Length: {SIZE}\r\n"
    with server.raw(head.encode() + b"Expect: 100-continue\r\n\r\n") as sock:
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(NEW)
        response = http.client.HTTPResponse(sock)
        response.begin()
        assert response.status == 200
    assert disk.read_bytes() == NEW


@pytest.mark.parametrize(
    ("method", "target"), [("PUT", ""), ("PATCH", ""), ("POST", "/flush")], ids=str
)
def test_changing_an_image_whose_back_end_is_gone_is_an_error(
    server: Server, workplace: Path, method: str, target: str
):
    path = server.add("gone", socket=str(workplace / "gone.sock"))
    body = NEW if method == "PUT" else b'{"op":"zero","size":1}'
    headers = {"Content-Type": "application/json"}
    assert_refused(server.request(method, path + target, body, headers), 500, "backend error")


# Flush


@pytest.fixture(scope="module")
def logged(workplace: Path) -> Iterator[tuple[Path, Path]]:
    """A server that logs its requests: socket and log."""
    log = workplace / "nbdkit.log"
    options = ("--filter=log", "memory", str(SIZE), f"logfile={log}")
    with nbdkit(workplace / "logged.sock", *options) as sock:
        yield sock, log


def test_put_does_not_flush_and_post_flush_does(server: Server, logged: tuple[Path, Path]):
    sock, log = logged
    path = server.add("logged", socket=str(sock))
    assert server.request("PUT", path, NEW).status == 200
    assert " Write " in log.read_text()
    assert " Flush " not in log.read_text()
    answer = server.request("POST", path + "/flush")
    assert_ok(answer)
    assert log.read_text().count(" Flush ") == 1


JSON = {"Content-Type": "application/json"}
PART = {"Content-Range": "bytes 0-4095/*"}
CHANGES = [
    ("PUT", "", NEW, {}),
    ("PUT", "", NEW[:4096], PART),
    ("PUT", "?flush=y", NEW[:4096], PART),
    ("PATCH", "", NEW[:4096], {"Range": "bytes=0-4095"}),
    ("PATCH", "", b'{"op":"zero","offset":0,"size":4096}', JSON),
    ("PATCH", "", b'{"op":"zero","offset":5,"size":50,"flush":true}', JSON),
]


@pytest.mark.parametrize(
    ("multi_conn", "fields", "kept"),
    [("disable", {}, True), ("plugin", {}, False), ("disable", {"flush": "image"}, False)],
    ids=["without_multi_conn", "with_multi_conn", "trusted"],
)
def test_without_multi_conn_each_write_is_flushed_on_its_own_connection(
    server: Server, home: Path, multi_conn: str, fields: dict[str, str], kept: bool
):
    """NBD_CMD_FLUSH covers other connections only where the server says so."""
    log = home / "log"
    filters = ("--filter=log", "--filter=multi-conn", f"multi-conn-mode={multi_conn}")
    options = ("memory", str(SIZE), f"logfile={log}", "multi-conn-track-dirty=off")
    with nbdkit(home / "flushed.sock", *filters[:2], *options, filters[2]) as sock:
        path = server.add("flushed", socket=str(sock), **fields)
        for method, query, body, headers in CHANGES:
            before = len(log.read_text()) if log.exists() else 0
            assert server.request(method, path + query, body, headers).status == 200
            done = [line.split() for line in log.read_text()[before:].splitlines()]
            # date time connection=N Write ...; what ends begins with three dots
            calls = [(words[2], words[3]) for words in done if words[2].startswith("connection=")]
            changed = [call for call in calls if call[1] in {"Write", "Zero"}]
            flushed = [call for call in calls if call[1] == "Flush"]
            is_asked = query == "?flush=y" or b"true" in body[:64]
            assert flushed == [(changed[-1][0], "Flush")] * (kept or is_asked), (method, query)


@pytest.mark.parametrize("target", ["/flush", "/flush/"])
@pytest.mark.parametrize("body", [None, b"", b"anything", b'{"op":"zero","size":99}'], ids=str)
def test_flush_does_not_look_at_its_body(
    server: Server, disk: Path, target: str, body: bytes | None
):
    answer = server.request("POST", DISK + target, body)
    assert (answer.status, answer.json) == (200, {"ok": True})
    assert disk.read_bytes() == OLD


NO_FLUSH = ("eval", f"get_size=echo {SIZE}", "can_write=exit 0", "can_flush=exit 3")


def test_flush_of_an_export_without_flush_is_refused(server: Server, workplace: Path):
    options = (*NO_FLUSH, "pread=exit 1", "pwrite=exit 1")
    with nbdkit(workplace / "noflush.sock", *options) as sock:
        path = server.add("noflush", socket=str(sock))
        answer = server.request("POST", path + "/flush")
        assert_refused(answer, 400, "flush not supported by this export")


def test_a_failing_flush_is_an_error(server: Server, workplace: Path):
    options = ("eval", "get_size=echo 512", "can_write=exit 0", "can_flush=exit 0")
    fails = ("pread=exit 1", "pwrite=exit 1", "flush=echo EIO told-so >&2; exit 1")
    with nbdkit(workplace / "badflush.sock", *options, *fails) as sock:
        path = server.add("badflush", socket=str(sock))
        assert_refused(server.request("POST", path + "/flush"), 500, "backend error")
