# SPDX-License-Identifier: Apache-2.0
"""Whatever comes, the server answers or hangs up, goes on answering, and no worker dies.

``FUZZ_EXAMPLES`` says how many examples each test tries (``scripts/fuzz``); few by default.
"""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.chaos.world import Nbd
from tests.system.disks import sparse
from tests.system.harness import Server, exchange, wait_until
from tests.system.killing import kill_worker

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
SIZE = 1 << 16
HEADER, STATES = 64, 1024
TABLE = HEADER + STATES + 1024 * 448


def examples(number: int) -> settings:
    return settings(
        max_examples=EXAMPLES or number,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    sparse(workplace / "image", SIZE)
    with (
        Nbd(sparse(workplace / "fuzzed", SIZE)) as nbd,
        Server(workplace, client_timeout=2, workers=2, max_readers=4) as running,
    ):
        running.add("file", backend="file", file=str(workplace / "image"))
        running.add("disk", socket=str(nbd.socket))
        wait_until(lambda: len(running.worker_pids()) == 2)
        yield running


@pytest.fixture(autouse=True)
def survived(server: Server) -> Iterator[None]:
    """Every test: the same workers live, nothing is held, and no traceback was written."""
    workers = server.worker_pids()
    seen = len(server.log)
    yield
    assert server.worker_pids() == workers
    wait_until(lambda: not server.holders(), 5)
    assert_healthy(server)
    log = server.log[seen:]
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]


def assert_healthy(server: Server) -> None:
    for name in ("file", "disk"):
        assert server.request("OPTIONS", f"/images/{name}").status == 200
        assert server.request("GET", f"/images/{name}").status == 200


def statuses(server: Server, data: bytes) -> list[int]:
    """Send bytes and the end of input; return the statuses of all answers up to the end."""
    received = bytearray()
    with server.raw(timeout=10) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(data)
        sock.shutdown(1)
        while piece := sock.recv(1 << 20):
            received += piece
    if not received:
        return []
    assert received.startswith(b"HTTP/1."), received[:100]
    return [int(part[2:5]) for part in received.split(b"HTTP/1.")[1:] if part[2:5].isdigit()]


# Raw bytes

METHODS = st.sampled_from([b"GET", b"PUT", b"PATCH", b"POST", b"OPTIONS", b"HEAD", b"DELETE", b"g"])
TARGETS = st.sampled_from(
    b"/images/file /images/disk /images/disk/extents /images/file/flush * /images/ /images/%00 "
    b"// http://x/images/disk /images/disk?a=%ff ?".split()
)
VALUES = st.one_of(
    st.sampled_from(
        [b"0", b"5", b"-1", b"+1", b"65536", b"1_0", b"99999999999999999999", b"chunked"]
    )
    | st.sampled_from([b"bytes=0-9", b"bytes=-5", b"bytes 0-9/*", b"bytes=5-1", b"100-continue"])
    | st.sampled_from([b"close", b"keep-alive", b"application/json", b"upgrade", b"\xb2", b""]),
    st.binary(max_size=20),
)
NAMES = st.sampled_from(
    b"Host|Content-Length|Transfer-Encoding|Range|Content-Range|Expect|Connection|Content-Type|"
    b"If-Range|Upgrade|X|| X|X\0|x:y".split(b"|")
)
FIELDS = st.tuples(NAMES, st.sampled_from([b": ", b":", b" : ", b""]), VALUES).map(b"".join)
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b""])
VERSIONS = st.sampled_from(
    [b" HTTP/1.1", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/1.2", b" HTTP/2.0", b""]
)
HEADS = st.builds(
    lambda method, target, version, hosts, fields, end: (
        method + b" " + target + version + end + b"".join(f + end for f in hosts + fields) + end
    ),
    METHODS,
    st.one_of(TARGETS, st.binary(max_size=30)),
    VERSIONS,
    st.sampled_from([[b"Host: x"], [b"Host: x"], []]),
    st.lists(FIELDS, max_size=6),
    ENDS,
)
STREAMS = st.lists(st.one_of(HEADS, HEADS, st.binary(max_size=300)), max_size=4).map(b"".join)


@examples(300)
@given(STREAMS)
@example(b"")
@example(b"\r\n" * 5000)
@example(b"\0" * 70_000)
def test_any_bytes_at_the_socket(server, data):
    assert not set(statuses(server, data)) - {100, 200, 206, *range(400, 432), 501, 503}


@examples(200)
@given(
    st.sampled_from([b"GET", b"PUT", b"PATCH", b"POST"]),
    st.sampled_from([b"/images/file", b"/images/disk", b"/images/disk/extents"]),
    st.dictionaries(
        st.sampled_from([b"Range", b"Content-Range", b"Content-Length", b"If-Range"]),
        st.one_of(
            VALUES,
            st.from_regex(rb"bytes[= ][0-9]{0,22}-[0-9]{0,22}(/[0-9*]{0,22})?", fullmatch=True),
            st.from_regex(rb"[ +-]?[0-9]{1,24}[ x]?", fullmatch=True),
        ),
    ),
    st.binary(max_size=50),
)
def test_any_range_and_length(server, method, target, fields, body):
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: x"]
    lines += [name + b": " + value for name, value in fields.items()]
    seen = statuses(server, b"\r\n".join([*lines, b"", body]))
    # 100: the server has asked whether the client, which has sent all, is still there.
    assert not set(seen) - {100, 200, 206, *range(400, 432), 501, 503}


# JSON bodies

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.integers(0, SIZE)
)
MEMBERS = st.sampled_from(["op", "offset", "size", "flush", "x"])
ANY_JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=9,
)
OPERATIONS = st.fixed_dictionaries(
    {"op": st.sampled_from(["zero", "flush", "Zero", None])},
    optional={"offset": LEAVES, "size": LEAVES, "flush": LEAVES},
)
BODIES = st.one_of(
    st.binary(max_size=100),
    ANY_JSON.map(lambda value: json.dumps(value).encode()),
    OPERATIONS.map(lambda value: json.dumps(value).encode()),
)


@examples(200)
@given(BODIES)
@example(b"[" * 60_000)
@example(b'{"op":"zero","size":' + b"9" * 60_000 + b"}")
@example(b'{"op":"zero","size":1e999}')
@example(b'{"op":"zero","size":1,"size":2}')
@example(b'"\\ud800"')
@example(b"\xef\xbb\xbf{}")
def test_any_json_body(server, body):
    headers = {"Content-Type": "application/json"}
    answer = server.request("PATCH", "/images/disk", body, headers)
    assert answer.status in {200, 400}
    assert answer.json


# Transfer files

PLACES = st.one_of(
    st.sampled_from(
        ["/nonexistent", "", " ", ".", "/", "\0", "a\0b", "\ud800", "x" * 200, "\u202e"]
    ),
    st.text(max_size=10).map(lambda text: "/nonexistent/" + text),
    LEAVES,
)
TRANSFERS = st.one_of(
    st.binary(max_size=200),
    ANY_JSON.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {},
        optional={
            "backend": st.one_of(st.sampled_from(["nbd", "NBD", "file", "x", "\u0130"]), LEAVES),
            "socket": PLACES,
            "file": PLACES,
            "export": PLACES,
            "export_bitmap": PLACES,
            "read_only": LEAVES,
        },
    ).map(lambda value: json.dumps(value).encode()),
)


@examples(200)
@given(TRANSFERS)
@example(b'{"backend":"file","file":"/dev/null"}')
@example(b'{"backend":"file","file":"/x\\u0000y"}')
@example(b'{"socket":"/x\\u0000y"}')
@example(b'{"socket":"/tmp/\\ud800"}')
@example(b'{"socket":"/' + b"x" * 300 + b'"}')
@example(b'{"socket":"/nonexistent","export":"' + b"e" * 5000 + b'"}')
@example(b"[" * 65_000)
@example(b'{"idle_timeout_seconds":1e400}')
def test_any_transfer_file(server, content):
    path = server.config / ".new"
    path.write_bytes(content)
    path.chmod(0o600)
    path.rename(server.config / "any")
    with contextlib.closing(server.connect()) as connection:
        for method, tail in (("OPTIONS", ""), ("GET", ""), ("GET", "/extents"), ("POST", "/flush")):
            answer = exchange(connection, method, f"/images/any{tail}")
            assert answer.status in {200, 400, 404, 500}, answer.body
            assert b"internal" not in answer.body


# The slot table

OFFSETS = st.one_of(
    st.integers(0, HEADER - 1),
    st.integers(HEADER, HEADER + STATES - 1),
    st.integers(HEADER, HEADER + 40),
    st.integers(HEADER + STATES, TABLE - 1),
    st.integers(HEADER + STATES, HEADER + STATES + 448 * 8),
)


@examples(60)
@given(st.lists(st.tuples(OFFSETS, st.binary(min_size=1, max_size=2000)), min_size=1, max_size=5))
@example([(HEADER, b"\x01" * STATES)])
@example([(HEADER, b"\x02" * STATES)])
@example([(HEADER, b"\x04" * STATES)])
@example([(HEADER, b"\xff" * STATES)])
@example([(0, b"\xff" * TABLE)])
@example([(0, bytes(TABLE))])
def test_any_bytes_in_the_slot_table(server, patches):
    scribble(server, patches)
    assert_healthy(server)
    assert server.request("PUT", "/images/file", bytes(SIZE)).status == 200
    assert server.request("GET", "/images/disk/extents").status == 200


def scribble(server: Server, patches: list[tuple[int, bytes]]) -> None:
    """Overwrite parts of the shared file, never beyond its end."""
    with (server.runtime / "slots").open("rb+", buffering=0) as table:
        for offset, data in patches:
            table.seek(offset)
            table.write(data[: TABLE - offset])


@pytest.fixture
def spare(workplace: Path) -> Iterator[Server]:
    home = workplace / "spare"
    home.mkdir(exist_ok=True)
    with Server(home, workers=2) as running:
        running.add("file", backend="file", file=str(workplace / "image"))
        wait_until(lambda: len(running.worker_pids()) == 2)
        yield running


@pytest.mark.parametrize("event", ["worker killed", "reload"])
@pytest.mark.parametrize("content", [b"\xff", b"\0"], ids=["ones", "zeros"])
def test_a_damaged_header_keeps_no_new_worker_from_starting(spare, content, event):
    before = spare.worker_pids()
    scribble(spare, [(0, content * HEADER)])
    assert spare.process is not None
    if event == "reload":
        spare.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not set(before) & set(spare.worker_pids()))
    else:
        with contextlib.closing(spare.connect()) as connection:
            assert exchange(connection, "OPTIONS", "/images/file").status == 200
            kill_worker(spare, connection.sock)
    wait_until(lambda: len(set(spare.worker_pids()) - set(before)) >= 1)
    wait_until(lambda: len(spare.worker_pids()) == 2)
    for _ in range(20):
        assert len(spare.request("GET", "/images/file").body) == SIZE
    assert spare.holders() == []
