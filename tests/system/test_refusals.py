# SPDX-License-Identifier: Apache-2.0
"""Refused uploads: refused before the body is read, heard while it is sent, never misread."""

import contextlib
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import putting, read_answer
from tests.system.harness import Server, nbdkit, qemu_nbd, wait_until

SIZE = 1 << 20
#: Many times what the socket buffers of a connection hold.
HUGE = 96 << 20
#: What a body looks like that wants to be taken for requests.
SMUGGLED = b"PUT /images/free HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"

#: Name of a case: request line, further headers, status and message.
CASES: dict[str, tuple[str, str, int, str]] = {
    "no such route": ("PUT /nothing", "", 404, "not found"),
    "unknown id": ("PUT /images/nobody", "", 404, "unknown image_id"),
    "impossible id": ("PUT /images/a%2Fb", "", 404, "unknown image_id"),
    "lacking method": ("DELETE /images/nbd", "", 405, "method not allowed"),
    "read-only transfer": ("PUT /images/sealed", "", 405, "method not allowed"),
    "read-only export": ("PUT /images/read-only", "", 405, "method not allowed"),
    "Range": (
        "PUT /images/nbd",
        "Range: bytes=0-9\r\n",
        400,
        "Range/Content-Range not supported; full writes only",
    ),
    "other size": (
        "PUT /images/nbd",
        "",
        400,
        f"Content-Length ({HUGE}) must equal export size ({SIZE})",
    ),
    "other length than range": (
        "PATCH /images/nbd",
        "Range: bytes=0-9\r\n",
        400,
        f"Content-Length ({HUGE}) must equal range length (10)",
    ),
    "range outside": (
        "PATCH /images/nbd",
        f"Range: bytes={SIZE}-\r\n",
        416,
        "range not satisfiable",
    ),
    "JSON too long": (
        "PATCH /images/nbd",
        "Content-Type: application/json\r\n",
        400,
        "Invalid Content-Length",
    ),
    "no media type": (
        "PATCH /images/nbd",
        "",
        415,
        "PATCH requires Content-Type: application/json (for zero/flush) or Range with binary body",
    ),
    "PATCH of a file": (
        "PATCH /images/free",
        "",
        400,
        "range writes and PATCH not supported for file backend; use PUT for full upload",
    ),
    "lock busy": ("PUT /images/busy", "", 409, "image busy"),
    "slots taken": ("PUT /images/free", "", 503, "too many parallel writes"),
    "back end gone": ("PUT /images/dead", "", 500, "backend error"),
    "no access": ("PUT /images/directory", "", 500, "failed to access file"),
}
#: Those for which another upload has to be running.
BUSY_CASES = {"lock busy", "slots taken"}


@pytest.fixture(scope="module")
def home(workplace: Path) -> Iterator[Path]:
    (workplace / "image").write_bytes(bytes(SIZE))
    for name in ("free", "busy"):
        (workplace / name).write_bytes(b"untouched")
    read_only = workplace / "ro.sock"
    with (
        qemu_nbd(workplace / "image"),
        nbdkit(read_only, "--readonly", "memory", str(SIZE)),
    ):
        yield workplace


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with Server(home) as running:
        running.add("nbd", socket=str(home / "image.sock"))
        running.add("sealed", socket=str(home / "image.sock"), read_only=True)
        running.add("read-only", socket=str(home / "ro.sock"))
        running.add("dead", socket=str(home / "nobody.sock"))
        running.add("directory", backend="file", file=str(home))
        for name in ("free", "busy"):
            running.add(name, backend="file", file=str(home / name))
        yield running


@pytest.fixture(params=CASES)
def case(request, server: Server, home: Path) -> Iterator[tuple[str, str, int, str]]:
    with contextlib.ExitStack() as stack:
        if request.param in BUSY_CASES:
            stack.enter_context(putting(server, "/images/busy", SIZE))
        yield CASES[request.param]
    if request.param in BUSY_CASES:
        wait_until(lambda: server.holders() == [])
    assert (home / "free").read_bytes() == b"untouched"


def head(line: str, fields: str, length: int = HUGE) -> bytes:
    return f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{fields}\r\n".encode()


def test_with_expect_no_100_is_sent(server, case):
    line, fields, status, message = case
    with server.raw(head(line, fields + "Expect: 100-continue\r\n")) as sock:
        answer = read_answer(sock.makefile("rb"))
    assert answer.refusal == (status, message)


def test_without_expect_the_answer_is_heard_after_a_huge_body(server, case):
    line, fields, status, message = case
    piece = SMUGGLED * (HUGE // 64 // len(SMUGGLED))
    with server.raw(head(line, fields)) as sock, sock.makefile("rb") as stream:
        for _ in range(64):
            sock.sendall(piece)
        sock.sendall(bytes(HUGE - 64 * len(piece)))
        assert read_answer(stream).refusal == (status, message)
        assert stream.read() == b""  # no second answer: no byte was taken for a request


def test_a_library_that_sends_first_and_then_reads_gets_the_answer(server):
    answer = server.request("PUT", "/images/nobody", bytes(HUGE))
    assert answer.refusal == (404, "unknown image_id")


def test_a_small_body_of_a_refused_upload_is_not_taken_for_a_request(server, case):
    line, fields, status, message = case
    if "Content-Length (" in message:
        message = message.replace(str(HUGE), str(len(SMUGGLED)))
    if fields == "Content-Type: application/json\r\n":
        fields += "Transfer-Encoding: chunked\r\n"  # refused at the head again, body of any size
    upload = head(line, fields, len(SMUGGLED))
    if "chunked" in fields:
        upload = upload.replace(f"Content-Length: {len(SMUGGLED)}\r\n".encode(), b"")
    probe = b"OPTIONS /images/free HTTP/1.1\r\nHost: x\r\n\r\n"
    with server.raw(upload + SMUGGLED + probe) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).refusal == (status, message)
        # Either the connection ends here, or its next request is the one that was sent.
        if stream.peek(1):
            assert read_answer(stream).json["features"] == ["flush", "digest", "checksum"]


def test_a_refused_upload_that_is_still_being_sent_holds_nothing(server):
    line, fields, status, message = CASES["other size"]
    with server.raw(head(line, fields)) as sock, sock.makefile("rb") as stream:
        sock.sendall(bytes(1 << 20))
        assert read_answer(stream).refusal == (status, message)
        assert server.holders() == []
        assert server.request("PUT", "/images/nbd", bytes(SIZE)).status == 200


def test_a_refused_client_that_never_stops_sending_is_cut_within_ten_seconds(server):
    with server.raw(head("PUT /images/nobody", "", 1 << 40)) as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).refusal == (404, "unknown image_id")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < began + 15:
                sock.sendall(b"x")
                select.select([], [], [], 0.05)
        assert 2 < time.monotonic() - began < 12


def test_a_chunked_upload_is_refused_and_none_of_it_is_taken_for_a_request(server, home):
    chunk = b"%x\r\n%b\r\n" % (len(SMUGGLED), SMUGGLED)
    fields = b"PUT /images/free HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server.raw(fields + chunk * 1000 + b"0\r\n\r\n") as sock, sock.makefile("rb") as stream:
        assert read_answer(stream).refusal == (400, "Content-Length required")
        assert stream.read() == b""
    assert (home / "free").read_bytes() == b"untouched"


def test_an_accepted_upload_gets_its_100_once_and_the_next_request_its_answer(server, home):
    (home / "new").write_bytes(b"")
    url = server.add("new", backend="file", file=str(home / "new"))
    expecting = head(f"PUT {url}", "Expect: 100-continue\r\n", 5)
    with server.raw(expecting) as sock, sock.makefile("rb") as stream:
        for _ in range(2):
            assert read_answer(stream).status == 100
            sock.sendall(b"bytes" + expecting)
            assert read_answer(stream).json == {"ok": True, "bytes_written": 5}
        assert read_answer(stream).status == 100
    assert (home / "new").read_bytes() == b"bytes"
