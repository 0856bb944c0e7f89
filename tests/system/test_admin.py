# SPDX-License-Identifier: Apache-2.0
"""The admin listener: who may ask, what is answered, and that nothing stands in its way."""

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import reading
from tests.system.harness import Server, free_port
from tests.system.pki import TlsServer, make_pki
from tests.system.skips import needs
from tests.system.watching import Admin, watched

PATHS = ("/", "/healthz", "/readyz", "/status", "/metrics")


@pytest.fixture(scope="module")
def server(workplace: Path, tcp: Admin, unix: Admin, big: dict[str, str]) -> Iterator[Server]:
    with watched(workplace, big, tcp, unix) as running:
        yield running


# What is answered, and to whom


@pytest.mark.parametrize("path", PATHS)
def test_get_and_head_are_answered_alike(admin, path):
    got, asked = admin.ask(path), admin.ask(path, "HEAD")
    assert (got.status, asked.status, asked.body) == (200, 200, b"")
    assert got.headers["Cache-Control"] == "no-store"
    assert got.headers["Access-Control-Allow-Origin"] is None
    assert int(got.headers["Content-Length"]) == len(got.body)
    assert asked.headers["Content-Type"] == got.headers["Content-Type"]


def test_a_server_that_is_well_says_so(admin):
    assert admin.ask("/healthz").body == b'{"status":"ok"}'
    assert admin.ask("/readyz").body == b'{"status":"ready","failed":[]}'


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/map?transfer=none", 404, "not found"),
        ("POST", "/", 405, "method not allowed"),
        ("GET", "/images/big", 404, "not found"),
        ("OPTIONS", "/images/*", 404, "not found"),
        ("GET", "/status/", 404, "not found"),
        ("PUT", "/images/big", 404, "not found"),
        ("POST", "/readyz", 405, "method not allowed"),
        ("OPTIONS", "/status", 405, "method not allowed"),
        ("DELETE", "/metrics", 405, "method not allowed"),
        ("BREW", "/healthz", 405, "method not allowed"),
    ],
)
def test_anything_else_is_refused(admin, method, path, status, message):
    answer = admin.ask(path, method)
    assert (answer.status, answer.json) == (status, {"error": message})
    assert answer.headers["Allow"] == ("GET, HEAD" if status == 405 else None)


@pytest.mark.parametrize("path", PATHS)
def test_the_clients_of_images_find_none_of_it(server, path):
    assert server.request("GET", path).refusal == (404, "not found")


PEER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    sys.exit("no permission")
try:
    sock.sendall(b"GET /status HTTP/1.0\\r\\n\\r\\n")
    print(sock.makefile().read())
except (BrokenPipeError, ConnectionResetError):
    pass
"""


def as_nobody(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["/usr/bin/python3", "-c", PEER, str(path)]
    return subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
        cwd="/", timeout=30, check=False,
    )  # fmt: skip


def test_the_socket_is_for_the_servers_user(server, unix):
    assert unix.place.stat().st_mode & 0o777 == 0o600


@needs("owners")
def test_others_are_kept_out_by_mode_and_by_name(server, unix, workplace):
    workplace.chmod(0o711)
    try:
        assert as_nobody(unix.place).stderr.strip() == "no permission"
        unix.place.chmod(0o666)  # as it is for a moment after it was bound
        done = as_nobody(unix.place)
    finally:
        unix.place.chmod(0o600)
        workplace.chmod(0o700)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


BUG = """
from imageserver.observability.metrics import shown

def fail(_sources):
    raise ZeroDivisionError("a bug")

shown.exposition = fail
"""


def test_a_failure_of_our_own_is_logged_in_our_form_and_answered_in_json(home):
    admin = Admin(free_port())
    server = Server(home, workers=1, admin_bind=admin.bind, log_format="json")
    (home / "sitecustomize.py").write_text(BUG)  # imported by Python at its start (site)
    server.env["PYTHONPATH"] = str(home)
    with server:
        answer = admin.ask("/metrics")
        assert (answer.status, answer.json) == (500, {"error": "internal error"})
        assert answer.headers["Content-Type"] == "application/json"
        assert admin.ask("/healthz").status == 200
        lines = [json.loads(line) for line in server.log.splitlines()]
    (told,) = [line for line in lines if line["level"] == "error"]
    assert told["message"] == "GET /metrics failed"
    assert "Traceback" in json.dumps(told)


# Whatever else goes on


def test_it_answers_while_every_thread_and_slot_is_taken(home, big):
    admin = Admin(free_port())
    with Server(home, workers=1, threads=2, max_readers=2, admin_bind=admin.bind) as server:
        server.add("big", **big)
        with reading(server, "/images/big"), reading(server, "/images/big"):
            assert server.request("GET", "/images/big").refusal == (503, "server busy")
            assert [admin.ask(path).status for path in PATHS] == [200] * len(PATHS)
            assert [row["operation"] for row in admin.transfers()] == ["read", "read"]
            assert admin.status()["workers"][0]["busy"] == 2


def test_slow_clients_of_either_port_delay_nobody(home, big):
    admin = Admin(free_port())
    with (
        Server(home, workers=1, admin_bind=admin.bind) as server,
        contextlib.ExitStack() as stack,
    ):
        server.add("big", **big)
        head = b"GET /images/big HTTP/1.1\r\nX: "
        for _ in range(100):
            stack.enter_context(server.raw())
            stack.enter_context(server.raw(head))
        for index in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", admin.place))
            # Half a head, or an answer that nobody reads.
            sock.sendall(
                b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: " + b"x\r\n\r\n" * (index % 2)
            )
        for path in PATHS * 3:
            began = time.monotonic()
            assert admin.ask(path).status == 200
            assert time.monotonic() - began < 2
        assert server.request("OPTIONS", "/images/big").status == 200


def test_clients_that_ask_in_advance_and_take_no_answer_keep_nobody_out(home):
    admin = Admin(free_port())
    with Server(home, workers=1, admin_bind=admin.bind), contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.connect(("127.0.0.1", admin.place))
            sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 60)
        for path in PATHS * 3:
            began = time.monotonic()
            assert admin.ask(path).status == 200
            assert time.monotonic() - began < 2


def test_each_answer_ends_its_connection(server, tcp):
    with socket.create_connection(("127.0.0.1", tcp.place), 30) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2)
        answer = sock.makefile("rb").read()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer


def test_a_head_that_is_wrong_is_refused_there_too(server, tcp):
    with socket.create_connection(("127.0.0.1", tcp.place), 30) as sock:
        sock.sendall(b"GET /status\r\n\r\n")
        answer = sock.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b'{"error":"invalid request line"}')


def test_it_is_plain_where_images_are_served_over_tls(home):
    admin = Admin(free_port())
    with TlsServer(home, make_pki(home / "pki"), workers=1, admin_bind=admin.bind):
        assert admin.ask("/readyz").status == 200
