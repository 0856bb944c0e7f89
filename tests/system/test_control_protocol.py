# SPDX-License-Identifier: Apache-2.0
"""What is said on the control socket (docs/api.md), by whom, and how long it may take."""

import contextlib
import json
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import reading
from tests.system.controlling import Control, ask_raw, controlled, file_of
from tests.system.harness import Server, wait_until
from tests.system.skips import needs


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with controlled(workplace, client_timeout=3) as running:
        yield running


def test_the_socket_is_for_owner_and_group(control):
    assert control.path.stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize("ends", [False, True], ids=["newline", "end"])
def test_a_request_ends_with_a_newline_or_with_the_input(control, ends):
    request = b'{"action":"status"}' + (b"" if ends else b"\n")
    assert json.loads(ask_raw(control.path, request, ends=ends))["status"] == "ok"


def test_a_request_may_arrive_byte_by_byte_and_what_follows_is_ignored(control):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(control.path))
        for byte in b'{"action":"status"}\n':
            sock.sendall(bytes([byte]))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b'{"action":"other"}\n')
        answer = sock.makefile("rb").read()
    assert (json.loads(answer)["status"], answer.count(b"\n")) == ("ok", 1)


EMPTY = {"transfers": [], "more": False}

MALFORMED = {
    "nothing": (b"", "invalid JSON: "),
    "empty line": (b"\n", "invalid JSON: "),
    "no json": (b"status\n", "invalid JSON: "),
    "cut off": (b'{"action":"sta', "invalid JSON: "),
    "two": (b'{"action":"status"}{"action":"status"}\n', "invalid JSON: "),
    "not utf-8": (b'{"action":"\xff"}\n', "invalid JSON: "),
    "binary": (bytes(range(256)), "invalid JSON: "),
    "deep": (b"[" * 100_000 + b"\n", "invalid JSON: "),
    "list": (b"[]\n", "request must be a JSON object"),
    "text": (b'"status"\n', "request must be a JSON object"),
    "no action": (b"{}\n", "missing action"),
    "unknown action": (b'{"action":"restart"}\n', "unknown action: restart"),
    "action of a wrong type": (b'{"action":["status"]}\n', "unknown action: "),
    "no id, no config": (b'{"action":"register"}\n', "missing transfer_id or config"),
    "no id": (b'{"action":"unregister"}\n', "missing transfer_id"),
    "path": (
        b'{"action":"register","transfer_id":"../x","config":{"file":"/x"}}\n',
        "invalid transfer_id",
    ),
    "server": (b'{"action":"unregister","transfer_id":"*"}\n', "invalid transfer_id"),
    "backend": (
        b'{"action":"register","transfer_id":"x","config":{"backend":"rbd"}}\n',
        "unsupported backend: rbd",
    ),
    "list beyond no id": (b'{"action":"list","after":"../x"}\n', "invalid after"),
    "config": (
        b'{"action":"register","transfer_id":"x","config":{"backend":"file"}}\n',
        'invalid config: missing "file"',
    ),
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "invalid JSON: "),
    "too large": (b'{"action":"' + b"x" * (128 << 10) + b'"}\n', "request is larger than"),
    "endless": (b"x" * (4 << 20), "request is larger than"),
    "file too long": (
        b'{"action":"register","transfer_id":"x","config":{"backend":"file","file":"/%s"}}\n'
        % (b"x" * (66 << 10)),
        "invalid config: larger than 65536 bytes",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_input_is_told_so_and_changes_nothing(control, name):
    request, message = MALFORMED[name]
    before = control.status()
    answer = ask_raw(control.path, request, ends=True)
    told = json.loads(answer)
    assert answer.count(b"\n") == 1
    assert (told["status"], set(told)) == ("error", {"status", "message"})
    assert told["message"].startswith(message)
    assert control.status() == before


def test_a_list_has_what_is_registered_in_order_until_it_ends(server, control):
    assert control.list() == {"status": "ok", "active_transfers": 0} | EMPTY
    control.register("b", **file_of(server, "one"), idle_timeout_seconds=5)
    control.register("\u00fc\nx", socket="/s", export="e", export_bitmap="b", read_only=True)
    control.register("a", **file_of(server, "two"), idle_timeout_seconds=1)
    one, two = file_of(server, "one"), file_of(server, "two")
    common = {"read_only": False, "idle_timeout_seconds": 600}
    nbd = {"backend": "nbd", "socket": "/s", "export": "e", "export_bitmap": "b"}
    nbd["flush"] = "connection"
    a = {"transfer_id": "a", "config": two | common | {"idle_timeout_seconds": 1}}
    b = {"transfer_id": "b", "config": one | common | {"idle_timeout_seconds": 5}}
    odd = {"transfer_id": "\u00fc\nx", "config": nbd | common | {"read_only": True}}
    assert control.list()["transfers"] == [a, b, odd]
    rest = {"transfers": [odd], "more": False}
    assert control.list(after="b") == {"status": "ok", "active_transfers": 3} | rest
    wait_until(lambda: control.list()["transfers"] == [b, odd])  # a has expired
    for name in ("b", "\u00fc\nx", "a"):
        control.unregister(name)
    assert control.list() == {"status": "ok", "active_transfers": 0} | EMPTY


def test_a_long_list_comes_in_pages_that_no_buffer_holds(server, control):
    path = "/" + "x" * 50_000
    names = [f"long-{number:02}" for number in range(30)]
    for name in names:
        control.register(name, backend="file", file=path)
    first = control.list()
    found = [transfer["transfer_id"] for transfer in first["transfers"]]
    assert (found, first["more"]) == (names[: len(found)], True)
    rest = control.list(after=found[-1])
    assert (found + [each["transfer_id"] for each in rest["transfers"]], rest["more"]) == (
        names,
        False,
    )
    for name in names:
        control.unregister(name)


def test_who_does_not_read_a_long_list_is_left_and_delays_nobody(server, control):
    control.register("long", backend="file", file="/" + "x" * 60_000)
    for number in range(12):
        control.register(f"long-{number}", backend="file", file="/" + "x" * 60_000)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(control.path))
        sock.sendall(b'{"action":"list"}\n')
        assert control.status()["active_transfers"] == 13
        cut = select.poll()
        cut.register(sock, select.POLLRDHUP)
        assert cut.poll(20_000)  # ms; the client timeout is 3 s
        assert not sock.makefile("rb").read().endswith(b"\n")
    for transfer in control.list()["transfers"]:
        control.unregister(transfer["transfer_id"])


def test_a_silent_peer_is_cut_off_and_delays_nobody(server, control):
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(30)]
        for sock in silent:
            sock.settimeout(30)
            sock.connect(str(control.path))
        assert control.status()["status"] == "ok"
        assert time.monotonic() - began < 2
        for sock in silent:
            assert b"request took too long" in sock.makefile("rb").read()
    assert time.monotonic() - began < 6  # the client timeout is 3 s


def test_it_answers_while_every_transfer_thread_is_busy(home, big):
    with Server(home, workers=1, threads=2, control_socket=home / "c") as server:
        control = Control(home / "c")
        control.register("busy", **big)
        with reading(server, "/images/busy"), reading(server, "/images/busy"):
            assert server.request("GET", "/images/busy").refusal == (503, "server busy")
            assert control.status("busy")["requests_in_flight"] == 2


PEER = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
except PermissionError:
    sys.exit("no permission")
sock.sendall(b'{"action":"status"}\\n')
print(sock.makefile().read())
"""


def as_nobody(path: Path) -> subprocess.CompletedProcess[str]:
    command = ["/usr/bin/python3", "-c", PEER, str(path)]
    return subprocess.run(
        command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
        cwd="/", timeout=30, check=False,
    )  # fmt: skip


@needs("owners")
def test_a_peer_without_rights_is_refused_by_mode_and_by_name(workplace, home):
    with Server(home, control_socket=home / "c") as server:
        control = Control(home / "c")
        for directory in (workplace, home):
            directory.chmod(0o711)
        try:
            assert as_nobody(control.path).stderr.strip() == "no permission"
            control.path.chmod(0o666)
            answer = json.loads(as_nobody(control.path).stdout)
        finally:
            workplace.chmod(0o700)
        assert answer == {"status": "error", "message": "permission denied"}
        assert "refused: uid=65534" in server.log
        assert control.status()["status"] == "ok"
