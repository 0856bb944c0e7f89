# SPDX-License-Identifier: Apache-2.0
"""What is said on the control socket (docs/api.md), by whom, and how long it may take."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.clients import reading
from tests.system.controlling import Control, ask_raw, controlled, file_of
from tests.system.harness import Server, wait_until
from tests.system.skips import needs


@pytest.fixture(scope="module")
def server(workplace: Path) -> Iterator[Server]:
    with controlled(workplace) as running:
        yield running


def test_the_socket_is_for_owner_and_group(control):
    assert control.path.stat().st_mode & 0o777 == 0o660


EMPTY = {"transfers": [], "more": False}

#: One for each way to be refused; tests/unit/server/test_control.py has every sentence.
MALFORMED = {
    "nothing": (b"", "invalid JSON: "),
    "binary": (bytes(range(256)), "invalid JSON: "),
    "no action": (b"{}\n", "missing action"),
    "path": (
        b'{"action":"register","transfer_id":"../x","config":{"file":"/x"}}\n',
        "invalid transfer_id",
    ),
    "config": (
        b'{"action":"register","transfer_id":"x","config":{"backend":"file"}}\n',
        'invalid config: missing "file"',
    ),
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
    nbd |= {"flush": "connection", "sparse": True}
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
