# SPDX-License-Identifier: Apache-2.0
"""Strange NBD servers (docs/api.md): they lack, limit, fail, and the bytes stay right."""

import contextlib
import http.client
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.answers import assert_refused
from tests.system.harness import (
    Server,
    exchange,
    nbdkit,
    process,
    program,
    qemu_nbd,
    repeatable,
)

CHUNK = 4096
SETTINGS = {"chunk_size": CHUNK, "max_readers": 1}
JSON = {"Content-Type": "application/json"}
ZERO_ALL = b'{"op":"zero","size":99999999}'


@contextlib.contextmanager
def served(server: Server, *arguments: str) -> Iterator[str]:
    """Serve with nbdkit; yield the image's path on the server."""
    with nbdkit(server.directory / "strange.sock", *arguments) as sock:
        yield server.add("strange", socket=str(sock))


def scripted(size: int, **methods: str) -> tuple[str, ...]:
    """Return nbdkit's arguments for an image of shell scripts: $3 is the count, $4 the offset."""
    zeros = {"pread": "head -c $3 /dev/zero", "get_size": f"echo {size}"}
    return ("eval", *(f"{name}={script}" for name, script in (zeros | methods).items()))


def fails(error: str, at: int = 0) -> str:
    """Return a script that fails where the request reaches beyond ``at``.

    It takes what is to be written first: nbdkit calls a script that does not broken (EIO).
    """
    take = "[ $1 != pwrite ] || cat >/dev/null"
    return f"{take}; [ $(($3 + $4)) -le {at} ] || {{ echo {error} as told >&2; exit 1; }}"


# Servers with few abilities


@pytest.mark.parametrize(
    "options",
    [("--filter=nozero",), ("--no-sr",), ("--filter=noextents",), ("-t", "1")],
    ids=["without_zero", "simple_replies", "without_block_status", "one_thread"],
)
def test_a_server_with_few_abilities_reads_writes_and_zeroes(
    server: Server, options: tuple[str, ...]
):
    size = 9 * CHUNK + 100
    data = repeatable(options).randbytes(size)
    with (
        served(server, *options, "memory", str(size)) as path,
        contextlib.closing(server.connect()) as connection,
    ):
        assert exchange(connection, "PUT", path, data).status == 200
        assert exchange(connection, "GET", path).body == data
        body = b'{"op":"zero","offset":100,"size":20000,"flush":true}'
        assert exchange(connection, "PATCH", path, body, JSON).status == 200
        assert exchange(connection, "GET", path).body == data[:100] + bytes(20000) + data[20100:]
        assert exchange(connection, "POST", path + "/flush").status == 200
        assert exchange(connection, "GET", path + "/extents").status == 200


def test_zeroing_falls_back_where_the_server_cannot_do_it_fast(server: Server, workplace: Path):
    disk = workplace / "slow-zero"
    disk.write_bytes(b"x" * 5 * CHUNK)
    zero = 'case "$5" in *fast*) echo ENOTSUP no >&2; exit 1;; esac; '
    zero += f"head -c $3 /dev/zero | dd of={disk} conv=notrunc oflag=seek_bytes seek=$4 status=none"
    abilities = dict.fromkeys(("can_write", "can_zero", "can_fast_zero"), "exit 0")
    with served(server, *scripted(5 * CHUNK, zero=zero, pwrite="exit 1", **abilities)) as path:
        body = b'{"op":"zero","offset":5000,"size":8000}'
        assert server.request("PATCH", path, body, JSON).json == {"ok": True}
    assert disk.read_bytes() == b"x" * 5000 + bytes(8000) + b"x" * (5 * CHUNK - 13000)


def test_a_read_only_server_refuses_every_change(server: Server):
    with served(server, "-r", "memory", "512") as path:
        for answer in (
            server.request("PUT", path, bytes(512)),
            server.request("PATCH", path, b"x", {"Range": "bytes=0-0"}),
            server.request("PATCH", path, ZERO_ALL, JSON),
        ):
            assert_refused(answer, 405, answer.error, allow="GET, HEAD, OPTIONS")
        assert server.request("GET", path).body == bytes(512)


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit"])
def test_a_server_for_one_connection_serves_request_after_request(
    server: Server, workplace: Path, kind: str
):
    disk = workplace / "single"
    disk.write_bytes(bytes(CHUNK))
    sock = workplace / "single.sock"
    with contextlib.ExitStack() as stack:
        if kind == "qemu-nbd":
            stack.enter_context(qemu_nbd(disk, "--shared=1", sock=sock))
        else:
            stack.enter_context(nbdkit(sock, "--filter=limit", "file", str(disk), "limit=1"))
        path = server.add("single", socket=str(sock))
        connection = stack.enter_context(contextlib.closing(server.connect()))
        for n in range(20):
            data = bytes([n]) * CHUNK
            assert exchange(connection, "OPTIONS", path).json["features"][0] == "extents"
            assert exchange(connection, "PUT", path, data).status == 200
            assert exchange(connection, "HEAD", path).headers["Content-Length"] == str(CHUNK)
            assert exchange(connection, "GET", path).body == data
            assert exchange(connection, "GET", path + "/extents").status == 200
            assert exchange(connection, "POST", path + "/flush").status == 200


# Servers with block sizes


@pytest.mark.parametrize(
    ("minimum", "preferred", "maximum"),
    [(1, 512, 512), (512, 512, 512), (512, 512, 1536), (4096, 4096, 8192), (65536, 65536, 65536)],
    ids=str,
)
def test_unaligned_ranges_work_within_any_block_sizes(
    server: Server, minimum: int, preferred: int, maximum: int
):
    size, rng = 3 * 65536, repeatable((minimum, maximum))
    model = bytearray(rng.randbytes(size))
    sizes = (
        f"blocksize-{k}={v}"
        for k, v in (("minimum", minimum), ("preferred", preferred), ("maximum", maximum))
    )
    policy = ("--filter=blocksize-policy", "memory", str(size), "blocksize-error-policy=error")
    with (
        served(server, *policy, *sizes) as path,
        contextlib.closing(server.connect()) as connection,
    ):
        assert exchange(connection, "PUT", path, bytes(model)).status == 200
        for _ in range(60):
            start = rng.choice(
                [rng.randrange(size), rng.randrange(24) * 8192 + rng.choice([0, 511])]
            )
            stop = min(size, start + rng.choice([1, 100, 512, 4096, 4097, rng.randrange(1, size)]))
            span = {"Range": f"bytes={start}-{stop - 1}"}
            match rng.choice(["read", "write", "zero"]):
                case "read":
                    answer = exchange(connection, "GET", path, headers=span)
                    assert (answer.status, answer.body == model[start:stop]) == (206, True), span
                case "write":
                    model[start:stop] = rng.randbytes(stop - start)
                    data = bytes(model[start:stop])
                    assert exchange(connection, "PATCH", path, data, span).status == 200, span
                case "zero":
                    model[start:stop] = bytes(stop - start)
                    body = b'{"op":"zero","offset":%d,"size":%d}' % (start, stop - start)
                    assert exchange(connection, "PATCH", path, body, JSON).status == 200, span
        assert exchange(connection, "GET", path).body == model
        assert exchange(connection, "GET", path + "/extents").status == 200


# Servers with strange block status


@pytest.mark.parametrize("count", ["1", "$3"], ids=["one_at_a_time", "all_at_once"])
def test_extents_of_one_byte_come_one_by_one(server: Server, count: str):
    size = 101
    script = f"for i in $(seq {count}); do o=$(($4 + i - 1)); "
    script += '[ $((o % 2)) = 0 ] && t= || t=hole,zero; echo "$o 1 $t"; done'
    with served(server, *scripted(size, can_extents="exit 0", extents=script)) as path:
        assert server.request("GET", path + "/extents").json == [
            {"start": at, "length": 1, "zero": at % 2 == 1} for at in range(size)
        ]


@pytest.mark.parametrize("kind", ["", "hole,zero"], ids=repr)
def test_short_replies_that_agree_are_merged(server: Server, kind: str):
    script = f'echo "$4 {CHUNK} {kind}"'
    with served(server, *scripted(30 * CHUNK, can_extents="exit 0", extents=script)) as path:
        assert server.request("GET", path + "/extents").json == [
            {"start": 0, "length": 30 * CHUNK, "zero": kind != ""}
        ]
        assert server.request("GET", path + "/extents?context=dirty").json == [
            {"start": 0, "length": 30 * CHUNK, "dirty": True, "zero": kind != ""}
        ]


def test_a_block_status_that_fails_at_once_is_an_error(server: Server):
    script = "echo EIO as told >&2; exit 1"
    with served(server, *scripted(512, can_extents="exit 0", extents=script)) as path:
        for query in ("", "?context=dirty"):
            answer = server.request("GET", path + "/extents" + query)
            assert_refused(answer, 500, "backend error")


def test_a_block_status_that_fails_later_cuts_the_list_off(server: Server):
    script = f"[ $4 -ge {20 * CHUNK} ] && {{ echo EIO as told >&2; exit 1; }}; "
    script += f'[ $(($4 / {CHUNK} % 2)) = 0 ] && t= || t=hole; echo "$4 {CHUNK} $t"'
    with served(server, *scripted(40 * CHUNK, can_extents="exit 0", extents=script)) as path:
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            server.request("GET", path + "/extents")
        assert server.request("GET", path, headers={"Range": "bytes=0-9"}).body == bytes(10)


# Servers that fail


def test_a_read_that_fails_before_the_first_byte_is_an_error(server: Server):
    with served(server, *scripted(9 * CHUNK, pread=fails("EIO"))) as path:
        for headers in ({}, {"Range": "bytes=5000-"}):
            answer = server.request("GET", path, headers=headers)
            assert_refused(answer, 500, "backend error")
    assert "as told" not in answer.error


def test_a_read_that_fails_after_the_first_byte_cuts_the_connection(server: Server):
    pread = f"{fails('EIO', 20 * CHUNK)}; head -c $3 /dev/zero"
    with served(server, *scripted(40 * CHUNK, pread=pread)) as path:
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            server.request("GET", path)
        # The only read slot is free again, and what can be read is.
        answer = server.request("GET", path, headers={"Range": f"bytes=0-{20 * CHUNK - 1}"})
        assert (answer.status, answer.body) == (206, bytes(20 * CHUNK))
        answer = server.request("GET", path, headers={"Range": f"bytes={20 * CHUNK}-"})
        assert_refused(answer, 500, "backend error")


def test_a_server_that_dies_while_it_is_read_cuts_the_connection(server: Server):
    sock = server.directory / "dying.sock"
    command = [program("nbdkit"), "--foreground", f"--unix={sock}", "--filter=delay"]
    command += ["memory", "1M", "rdelay=20ms"]
    with process(command, sock.exists) as running:
        path = server.add("dying", socket=str(sock))
        with contextlib.closing(server.connect()) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.read(1) == b"\0"
            running.send_signal(signal.SIGKILL)
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()
        running.wait()
        assert_refused(server.request("GET", path), 500, "backend error")


WRITES = pytest.mark.parametrize(
    ("method", "fields", "body"),
    [
        ("PUT", {}, bytes(30 * CHUNK)),
        ("PATCH", {"Range": "bytes=7-"}, bytes(30 * CHUNK - 7)),
        ("PATCH", JSON, ZERO_ALL),
    ],
    ids=["PUT", "PATCH", "zero"],
)


@WRITES
@pytest.mark.parametrize("at", [0, 15 * CHUNK], ids=["at_once", "later"])
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("EIO", 500, "backend error"),
        ("ENOSPC", 507, "no space left"),
    ],
    ids=lambda value: value if str(value).startswith("E") else "",
)
def test_a_write_that_fails_is_answered_and_frees_the_image(
    server: Server,
    error: str,
    status: int,
    message: str,
    at: int,
    method: str,
    fields: dict[str, str],
    body: bytes,
):
    script = fails(error, at)
    methods = scripted(
        30 * CHUNK, can_write="exit 0", pwrite=script, can_zero="exit 0", zero=script
    )
    with served(server, *methods) as path:
        for _ in range(2):
            assert_refused(server.request(method, path, body, fields), status, message)


@WRITES
def test_a_failing_flush_or_write_is_not_reported_as_done(
    server: Server, method: str, fields: dict[str, str], body: bytes
):
    with served(server, "--filter=error", "memory", str(30 * CHUNK), "error-rate=100%") as path:
        assert_refused(server.request(method, path, body, fields), 500, "backend error")


BROKEN_FLUSH = {"flush": "echo EIO as told >&2; exit 1", "zero": "exit 0"}


@pytest.mark.parametrize("multi_conn", ["exit 0", "exit 3"], ids=["multi_conn", "own_flush"])
@pytest.mark.parametrize("flush", [b"true", b"false"], ids=["flush", "no_flush"])
def test_a_zero_whose_flush_fails_has_failed(server: Server, flush: bytes, multi_conn: str):
    able = dict.fromkeys(("can_write", "can_zero", "can_flush"), "exit 0")
    able["can_multi_conn"] = multi_conn
    with served(server, *scripted(CHUNK, **BROKEN_FLUSH, pwrite="exit 1", **able)) as path:
        body = b'{"op":"zero","size":10,"flush":%s}' % flush
        answer = server.request("PATCH", path, body, JSON)
    if flush == b"true" or multi_conn == "exit 3":
        assert_refused(answer, 500, "backend error")
    else:
        assert answer.json == {"ok": True}


@pytest.mark.parametrize(
    ("method", "fields"), [("PUT", {}), ("PATCH", {"Range": "bytes=0-"})], ids=["PUT", "PATCH"]
)
def test_a_write_whose_own_flush_fails_has_failed(
    server: Server, method: str, fields: dict[str, str]
):
    able = dict.fromkeys(("can_write", "can_flush"), "exit 0")
    with served(server, *scripted(CHUNK, **BROKEN_FLUSH, pwrite="cat >/dev/null", **able)) as path:
        answer = server.request(method, path, bytes(CHUNK), fields)
    assert_refused(answer, 500, "backend error")
