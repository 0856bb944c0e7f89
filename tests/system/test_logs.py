# SPDX-License-Identifier: Apache-2.0
"""The log of a real server: one line a finished operation, for people and for programs."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.clients import reading
from tests.system.harness import Answer, Server, qemu_nbd, wait_until

SIZE = 64 << 20
STAMP = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\] "


@pytest.fixture(scope="module")
def disk(workplace: Path) -> Iterator[Path]:
    path = workplace / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    with qemu_nbd(path) as sock:
        yield sock


@pytest.fixture(scope="module")
def server(workplace: Path, disk: Path) -> Iterator[Server]:
    with Server(workplace) as running:
        running.add("disk", socket=str(disk))
        yield running


def told(server: Server, request: str) -> dict[str, str]:
    """Wait for the line that a request has left; return its fields, and its ``level``."""

    def lines() -> list[str]:
        return [line for line in server.log.splitlines() if f" request={request}" in line]

    (line,) = wait_until(lines)
    head, _, fields = line.partition(" finished ")
    found = dict(pair.split("=", 1) for pair in shlex.split(fields))
    return found | {"level": head.split()[-1]}


def ask(server: Server, name: str, method: str, path: str, **more: Any) -> Answer:
    headers = {"X-Request-Id": name, **more.pop("headers", {})}
    return server.request(method, path, headers=headers, **more)


ZERO = json.dumps({"op": "zero", "offset": 4096, "size": 8192}).encode()
JSON = {"Content-Type": "application/json"}
OPERATIONS = {
    "read": ("GET", "", {}, f"0-{SIZE - 1}", SIZE, 200),
    "range": ("GET", "", {"headers": {"Range": "bytes=-16"}}, f"{SIZE - 16}-{SIZE - 1}", 16, 206),
    "write": (
        *("PATCH", ""),
        {"body": b"hello", "headers": {"Range": "bytes=7-11", "Content-Type": "x/y"}},
        *("7-11", 5, 200),
    ),
    "zero": ("PATCH", "", {"body": ZERO, "headers": JSON}, "4096-12287", 8192, 200),
    "flush": ("POST", "/flush", {}, "-", 0, 200),
    "extents": ("GET", "/extents", {}, f"0-{SIZE - 1}", SIZE, 200),
    "replace": ("PUT", "", {"body": bytes(SIZE)}, f"0-{SIZE - 1}", SIZE, 200),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_finished_operation_leaves_one_line(server: Server, name: str):
    method, target, more, span, count, status = OPERATIONS[name]
    answer = ask(server, f"r-{name}", method, "/images/disk" + target, **more)
    found = told(server, f"r-{name}")
    assert (answer.status, answer.headers["X-Request-Id"]) == (status, f"r-{name}")
    assert int(found["worker"]) in server.worker_pids()
    assert float(found["seconds"]) > 0
    assert (int(found["rate"]) > 0) == (count > 0)
    changing = ("worker", "seconds", "rate")
    assert {key: value for key, value in found.items() if key not in changing} == {
        "level": "[INFO]",
        "transfer": "disk",
        "op": "read" if name == "range" else name,
        "range": span,
        "bytes": str(count),
        "status": str(status),
        "client": "127.0.0.1",
        "request": f"r-{name}",
    }


def test_a_client_that_leaves_is_told_with_what_it_was_sent(server: Server):
    head = b"GET /images/disk HTTP/1.1\r\nHost: x\r\nX-Request-Id: gone\r\n\r\n"
    with server.raw(head) as sock:
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    found = told(server, "gone")
    assert (found["status"], found["error"], found["level"]) == ("200", "ClientGone", "[INFO]")
    assert 0 <= int(found["bytes"]) < SIZE


def test_a_refused_request_is_told_with_its_reason(server: Server):
    assert ask(server, "lost", "GET", "/images/nobody").status == 404
    found = told(server, "lost")
    assert (found["transfer"], found["op"], found["status"]) == ("nobody", "get", "404")
    assert (found["error"], found["level"]) == ("UnknownImage", "[INFO]")


def test_no_id_can_forge_a_line(server: Server):
    server.add("a\n[1] [INFO] b=c", socket="/nowhere")
    assert server.request("OPTIONS", "/images/a%0A%5B1%5D%20%5BINFO%5D%20b=c").status == 200
    assert ask(server, "odd", "GET", "/images/a%0A%5B1%5D%20%5BINFO%5D%20b=c").status == 500
    assert told(server, "odd")["transfer"] == "a\\n[1] [INFO] b=c"
    (line,) = [line for line in server.log.splitlines() if "from configuration" in line]
    assert ' transfer="a\\n[1] [INFO] b=c" detail=' in line


def test_every_head_that_is_refused_leaves_a_line(home: Path, disk: Path):
    with Server(home, workers=1, threads=1, client_timeout=0.5, log_format="json") as server:
        server.add("disk", socket=str(disk))
        assert server.bare("GET nothing", "x").status == 400
        with server.raw(b"GET / HTTP/1.1\r\nX: y") as slow:
            assert slow.makefile("rb").read().startswith(b"HTTP/1.1 408 ")
        with reading(server, "/images/disk"):
            assert server.request("GET", "/images/disk").refusal == (503, "server busy")
        lines = [json.loads(line) for line in server.log.splitlines()]
    refused = [line for line in lines if line["message"] == "head refused"]
    assert [(line["client"], line["status"], line["detail"]) for line in refused] == [
        ("127.0.0.1", 400, "invalid request line"),
        ("127.0.0.1", 408, "request head took too long"),
        ("127.0.0.1", 503, "server busy"),
    ]


def test_probes_leave_no_line_but_get_an_id(server: Server):
    first = ask(server, "probe", "OPTIONS", "/images/disk")
    second = server.request("OPTIONS", "/images/*")
    assert first.headers["X-Request-Id"] == "probe"
    assert re.fullmatch("[0-9a-f]{16}", second.headers["X-Request-Id"])
    assert ask(server, "after", "POST", "/images/disk/flush").status == 200
    assert told(server, "after")["op"] == "flush"
    assert "request=probe" not in server.log


def test_the_start_prints_the_settings_in_force(server: Server):
    (line,) = [line for line in server.log.splitlines() if " settings in force " in line]
    shown = dict(pair.split("=", 1) for pair in shlex.split(line.partition(" in force ")[2]))
    assert shown["IMAGESERVER_BIND"] == f"127.0.0.1:{server.port}"
    assert shown["IMAGESERVER_MAX_READERS"] == "8"
    assert shown["IMAGESERVER_CONFIG_DIR"] == str(server.config)


def test_json_has_one_object_a_line_gunicorns_included(tmp_path_factory, disk: Path):
    home = tmp_path_factory.mktemp("json")
    with Server(home, log_format="json", workers=2) as server:
        server.add("disk", socket=str(disk))
        assert (
            ask(server, "r1", "GET", "/images/disk", headers={"Range": "bytes=0-9"}).status == 206
        )
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert all(re.match(r"\d{4}-\d\d-\d\dT", line["time"]) for line in lines)
    (settings,) = [line for line in lines if line["message"] == "settings in force"]
    assert settings["IMAGESERVER_LOG_FORMAT"] == "json"
    assert any(line["message"].startswith("Listening at") for line in lines)
    (operation,) = [line for line in lines if line["message"] == "finished"]
    assert (operation["transfer"], operation["range"], operation["bytes"]) == ("disk", "0-9", 10)


def test_under_systemd_no_line_has_a_time_and_each_has_its_priority(tmp_path_factory):
    home = tmp_path_factory.mktemp("journal")
    server = Server(home, workers=2)
    server.env["JOURNAL_STREAM"] = "9:12345"
    with server:
        pass
    lines = server.log.splitlines()
    assert [line for line in lines if not re.match(r"<[3467]>\[\d+\] \[[A-Z]+\] ", line)] == []
    assert any("Listening at" in line for line in lines)


def test_elsewhere_every_line_has_a_time(server: Server):
    lines = server.log.splitlines()
    assert [line for line in lines if not re.match(STAMP + r"\[\d+\] \[[A-Z]+\] ", line)] == []
